"""One service as a child process: settings as JSON on standard input, ``ready`` and ``failed`` lines on output.

``python -m kvatlas.deploy.processes.child PART`` ends when it gets SIGTERM, or when its standard input closes, which is
how it learns that its parent is gone, however that died.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, Final, cast

import msgspec

from kvatlas.bridge.runtime import settings
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes.main import run
from kvatlas.deploy.processes.parts import PARTS

#: A service whose parent is gone gets this long to stop.
_ORPHAN_SECONDS: Final = 10.0


def document(
    part: str, sections: dict[str, Any], *, prepared: bool = False, restarts: Restarts | None = None
) -> dict[str, Any]:
    """Return what a child reads from its standard input, as one line of JSON."""
    return {
        "sections": {name: msgspec.to_builtins(sections[name]) for name in PARTS[part].sections if name in sections},
        "prepared": prepared,
        "restarts": msgspec.to_builtins(restarts or Restarts()),
    }


def _watch_parent() -> threading.Event:
    gone = threading.Event()

    def watch() -> None:
        # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
        while os.read(0, 4096):
            pass
        gone.set()
        # The embedded broker went with the parent, so whoever waits for it to answer would wait in vain.
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-gone", daemon=True).start()
    return gone


def _say(kind: str, text: str) -> None:
    print(kind, json.dumps(text), flush=True)


def main() -> int:
    """Read the settings, run, and return the exit code."""
    part = sys.argv[1]
    given = json.loads(sys.stdin.buffer.readline())
    gone = _watch_parent()
    sections = {
        name: settings.load(name, common.section_class(name), document=given["sections"])
        for name in PARTS[part].sections
    }
    configure_logging(cast("settings.LogSettings", sections["log"]), part)
    restarts = msgspec.convert(given["restarts"], Restarts)
    return run(part, sections, prepared=given["prepared"], restarts=restarts, tell=_say, orphaned=gone)


if __name__ == "__main__":
    sys.exit(main())
