"""One part of `kvatlas up`: it is ended when it does not stop, and its death is told with its log."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.processes.launcher import Child, Launcher, LaunchRefusedError

_NOBODY = {"kafka": {"brokers": "127.0.0.1:1"}, "log": {}, "bridge": {}}


def test_a_part_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    """At the deadline a part that ignores SIGTERM is killed, and the caller learns of it."""
    child = Child("bridge", _NOBODY, tmp_path / "bridge.log")
    os.kill(child.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    child.terminate()
    began = time.monotonic()
    assert child.wait(began + 0.2) is False
    assert time.monotonic() - began < 5
    assert child.process.poll() == -signal.SIGKILL


def test_a_part_that_ended_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The error names part, exit code and log, and quotes what the part said last."""
    child = Child("bridge", {**_NOBODY, "bridge": {"engines": ["nonsense"]}}, tmp_path / "bridge.log")
    try:
        assert child.process.wait(60) == 2
        with pytest.raises(
            LaunchRefusedError, match=r"the bridge ended by itself with code 2; its log \S+bridge\.log"
        ) as caught:
            child.check()
        assert "'nonsense' is neither an address" in str(caught.value)
    finally:
        assert child.wait(time.monotonic() + 5) is True


def test_stopping_what_never_started_is_no_error(tmp_path: Path) -> None:
    """A launcher without parts stops at once, also with an embedded broker that was never started."""
    launcher = Launcher({"kafka": KafkaSettings(), "log": LogSettings()}, tmp_path, use_embedded=True)
    assert launcher.stop() == []
