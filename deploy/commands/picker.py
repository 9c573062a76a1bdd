"""``kvatlas picker``: the endpoint picker of a gateway."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, Final

from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.deploy.cli import common

HELP: Final = "pick the pod for a gateway's next request (Envoy, Gateway API)"

#: Settings of the scorer inside: the engine's own word replaces the later look at the index.
DEFAULTS: Final = {"scorer": {"outcome_delay_ms": 0.0}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log", "picker", "scorer", "tokenizer", prefixed=("scorer",))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; prints ``ready picker=HOST:PORT`` once an endpoint can be picked."""
    sections = common.load_sections(args, defaults=DEFAULTS)
    configure_logging(sections["log"], "picker")
    try:
        import uvloop  # noqa: PLC0415 - faster where it is installed

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        runner.run(_serve(sections))
    return 0


async def _serve(sections: dict[str, Any]) -> None:
    from kvatlas.deploy.processes.picking import ScorerWithPicker, say_ready  # noqa: PLC0415 - only when it runs

    stop = common.async_stop_event()
    service = ScorerWithPicker(sections["picker"], sections["kafka"], sections["scorer"], sections["tokenizer"])
    with common.leaving("picker"):
        try:
            await service.start()
            announcing = asyncio.create_task(say_ready(service))
            await service.run_until(stop)
            announcing.cancel()
        finally:
            await service.stop()
