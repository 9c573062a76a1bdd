"""One part of `kvatlas up`: it is ended when it does not stop, and its death is told with its log."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.processes.child import document
from kvatlas.deploy.processes.launcher import Launcher
from kvatlas.deploy.processes.supervisor import Child, LaunchRefusedError


def bridge(log: Path, **settings: object) -> Child:
    """A bridge without a broker."""
    sections = {"kafka": KafkaSettings(brokers="127.0.0.1:1"), "log": LogSettings()}
    given = document("bridge", {**sections, "bridge": BridgeSettings()})
    given["sections"]["bridge"] |= settings
    return Child("bridge", given, log)


def test_a_part_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    """At the deadline a part that ignores SIGTERM is killed, and the caller learns of it."""
    child = bridge(tmp_path / "bridge.log")
    os.kill(child.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    child.terminate()
    began = time.monotonic()
    assert child.wait(began + 0.2) is False
    assert time.monotonic() - began < 90
    assert child.process.poll() == -signal.SIGKILL


def test_a_part_that_ended_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The error names part, exit code and log, and quotes what the part said last."""
    child = bridge(tmp_path / "bridge.log", engines=["nonsense"])
    try:
        assert child.process.wait(60) == 2
        with pytest.raises(
            LaunchRefusedError, match=r"the bridge ended by itself with code 2; its log \S+bridge\.log"
        ) as caught:
            raise child.told(2)
        assert "'nonsense' is neither an address" in str(caught.value)
    finally:
        assert child.wait(time.monotonic() + 90) is True


def test_stopping_what_never_started_is_no_error(tmp_path: Path) -> None:
    """A launcher without parts stops at once, also with an embedded broker that was never started."""
    launcher = Launcher({"kafka": KafkaSettings(), "log": LogSettings()}, tmp_path, use_embedded=True)
    assert launcher.stop() == []
