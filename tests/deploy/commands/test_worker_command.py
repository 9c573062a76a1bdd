"""Tests of ``kvatlas worker`` apart from the worker itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from kvatlas.deploy.commands.worker import Supervisor, child_settings, shifted
from kvatlas.streams.options import WorkerSettings


@pytest.mark.parametrize(
    ("address", "number", "wanted"),
    [("127.0.0.1:0", 3, "127.0.0.1:0"), ("0.0.0.0:7000", 2, "0.0.0.0:7002"), ("", 1, ""), ("host", 1, "host")],
)
def test_fixed_ports_are_counted_up(address: str, number: int, wanted: str) -> None:
    """Each process listens on its own port; free ports stay free ports."""
    assert shifted(address, number) == wanted


def test_each_process_has_its_own_folder() -> None:
    """Two processes never share tables."""
    settings = WorkerSettings(state_dir="/s", processes=2, listen="h:7000", telemetry_listen="h:9000")
    child = child_settings(settings, 1)
    assert (child.state_dir, child.listen, child.telemetry_listen, child.processes) == ("/s/w1", "h:7001", "h:9001", 1)


def test_contradicting_settings_are_refused() -> None:
    """A heartbeat that cannot keep the session alive is an error."""
    with pytest.raises(ValueError, match="heartbeat"):
        WorkerSettings(session_timeout_seconds=4, heartbeat_seconds=3)


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (3, 1)])
def test_the_supervisor_revives_children_and_hands_sigterm_on(tmp_path: Path, code: int, wanted: int) -> None:
    """A child that dies is started anew; SIGTERM ends all, and a bad exit code is not hidden."""
    script = tmp_path / "child.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / f'starts-{{sys.argv[-1]}}'\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"
        "mark.write_text((mark.read_text() if mark.exists() else '') + 'x')\n"
        "if sys.argv[-1] == '1' and mark.read_text() == 'x': time.sleep(1.2); sys.exit(9)\n"
        "time.sleep(60)\n"
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def end() -> None:
        deadline = time.monotonic() + 30
        mark = tmp_path / "starts-1"
        while time.monotonic() < deadline and not (mark.exists() and mark.read_text() == "xx"):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    ender = threading.Thread(target=end)
    ender.start()
    try:
        assert Supervisor(2, [sys.executable, str(script)]).run() == wanted
    finally:
        ender.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (tmp_path / "starts-0").read_text() == "x"
    assert (tmp_path / "starts-1").read_text() == "xx"


def test_the_supervisor_ends_when_a_child_finds_its_settings_wrong(tmp_path: Path) -> None:
    """What is wrong now is wrong for ever: the children are not started anew and the exit code is handed on."""
    script = tmp_path / "child.py"
    script.write_text("import sys, time\nif sys.argv[-1] == '0': sys.exit(2)\ntime.sleep(60)\n")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert Supervisor(2, [sys.executable, str(script)]).run() == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
