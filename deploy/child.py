"""One service as a child process of the launcher: settings as JSON on standard input, ``ready ADDRESS`` on output.

``python -m kvatlas.deploy.child NAME`` ends when it gets SIGTERM, or when its standard input closes, which is how it
learns that the launcher is gone, however that died.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import threading
from typing import Any, Final

from kvatlas.bridge import settings
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.telemetry import configure_logging
from kvatlas.deploy.commands import common

SERVICES: Final = {
    "bridge": ("kvatlas.bridge.service", "BridgeService"),
    "worker": ("kvatlas.streams.service", "WorkerService"),
    "scorer": ("kvatlas.scorer.service", "ScorerService"),
}


async def serve(name: str, sections: dict[str, Any]) -> None:
    """Run a service until SIGTERM, Ctrl-C or the end of standard input."""
    module, attribute = SERVICES[name]
    service = getattr(importlib.import_module(module), attribute)(sections[name], sections["kafka"])
    stop = common.async_stop_event()
    loop = asyncio.get_running_loop()

    def watch() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, name="launcher-gone", daemon=True).start()

    async def announce() -> None:
        await service.ready.wait()
        print(f"ready {getattr(service, 'address', '')}", flush=True)

    announcing = asyncio.create_task(announce())
    try:
        await service.start()
        await service.run_until(stop)
    finally:
        announcing.cancel()
        await service.stop()


def main() -> int:
    """Read the settings, run, and return the exit code."""
    name = sys.argv[1]
    document = json.loads(sys.stdin.buffer.readline())
    try:
        sections = {
            section: settings.load(section, common.section_class(section), document=document)
            for section in ("kafka", "log", name)
        }
        configure_logging(sections["log"], name)
        asyncio.run(serve(name, sections))
    except KvatlasError as error:
        print(f"kvatlas {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
