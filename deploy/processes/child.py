"""One service as a child process of the launcher: settings as JSON on standard input, ``ready ADDRESS`` on output.

``python -m kvatlas.deploy.processes.child NAME`` ends when it gets SIGTERM, or when its standard input closes, which is
how it learns that the launcher is gone, however that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, cast

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.runtime import settings
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.deploy.cli import common

#: Name -> module and class of a service, and further sections that it takes by name.
SERVICES: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "bridge": ("kvatlas.bridge.relay.service", "BridgeService", ()),
    "worker": ("kvatlas.streams.service", "WorkerService", ()),
    "scorer": ("kvatlas.scorer.service", "ScorerService", ("tokenizer",)),
    "picker": ("kvatlas.deploy.processes.picking", "ScorerWithPicker", ("scorer", "tokenizer")),
}

#: A service whose launcher is gone gets this long to stop.
_ORPHAN_SECONDS: Final = 10.0


async def serve(name: str, sections: dict[str, Any]) -> None:
    """Run a service until SIGTERM, Ctrl-C or the end of standard input."""
    module, attribute, more = SERVICES[name]
    service = getattr(importlib.import_module(module), attribute)(
        sections[name], sections["kafka"], **{section: sections[section] for section in more}
    )
    stop = common.async_stop_event()
    loop = asyncio.get_running_loop()

    def watch() -> None:
        # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: it stops already
            loop.call_soon_threadsafe(stop.set)
        # The embedded broker went with the launcher, so whoever waits for it to answer would wait in vain.
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-gone", daemon=True).start()

    async def announce() -> None:
        await service.ready.wait()
        print(f"ready {getattr(service, 'address', '')}", flush=True)

    announcing = asyncio.create_task(announce())
    try:
        await service.start()
        tune_interpreter()
        await service.run_until(stop)
    finally:
        announcing.cancel()
        await service.stop()


async def _serve(name: str, sections: dict[str, Any]) -> None:
    with common.leaving(name):
        await serve(name, sections)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - faster where it is installed
    except ImportError:
        return None
    return uvloop.new_event_loop


def main() -> int:
    """Read the settings, run, and return the exit code."""
    name = sys.argv[1]
    document = json.loads(sys.stdin.buffer.readline())
    try:
        sections = {
            section: settings.load(section, common.section_class(section), document=document)
            for section in ("kafka", "log", name, *SERVICES[name][2])
        }
        configure_logging(cast("settings.LogSettings", sections["log"]), name)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(name, sections))
    except KvatlasError as error:
        print(f"kvatlas {name}: {error}", file=sys.stderr)
        return common.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
