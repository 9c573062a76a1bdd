"""``kvatlas scorer``."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, Final

from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.deploy.brokers.rights import check_rights, rights_of
from kvatlas.deploy.cli import common
from kvatlas.scorer.service import ScorerService

HELP: Final = "answer which pod holds a prompt's prefix"
_SECTIONS: Final = ("kafka", "log", "scorer", "tokenizer")


def _names() -> tuple[str, ...]:
    return tuple(name for name in _SECTIONS if name in common.SECTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, *_names(), "picker", prefixed=("picker",))
    parser.add_argument("--with-picker", action="store_true", help="also pick pods for a gateway, in this process")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; prints ``ready scorer=HOST:PORT`` once scores can be asked for."""
    sections = common.load_sections(args)
    configure_logging(sections["log"], "scorer")
    try:
        import uvloop  # noqa: PLC0415 - faster where it is installed

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        runner.run(_serve_both(sections) if args.with_picker else _serve(sections))
    return 0


async def _serve_both(sections: dict[str, Any]) -> None:
    """Run scorer and picker; the picker answers while Kafka is away."""
    from kvatlas.deploy.processes.picking import ScorerWithPicker, say_ready  # noqa: PLC0415 - only when it runs

    stop = common.async_stop_event()
    service = ScorerWithPicker(
        sections["picker"], sections["kafka"], sections["scorer"], sections["tokenizer"], serve=True
    )
    with common.leaving("scorer"):
        try:
            await service.start()
            announcing = asyncio.create_task(say_ready(service))
            await service.run_until(stop)
            announcing.cancel()
        finally:
            await service.stop()


async def _serve(sections: dict[str, Any]) -> None:
    stop = common.async_stop_event()
    kafka, wait_seconds = sections["kafka"], sections["scorer"].start_timeout_seconds
    service = ScorerService(sections["scorer"], kafka, tokenizer=sections.get("tokenizer"))
    check = check_rights(kafka, rights_of("scorer", kafka), wait_seconds=wait_seconds)
    if not await common.unless_stopped(stop, check):
        return
    try:
        await service.start()
        ready = asyncio.ensure_future(service.ready.wait())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({ready, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            tune_interpreter()
            print(f"ready scorer={service.address}", flush=True)
        ready.cancel()
        await stopping
    finally:
        await service.stop()
