"""The supervisor: dead processes come back after a growing pause, hopeless ones are given up with their reason."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.processes import supervisor
from kvatlas.deploy.processes.supervisor import Child, Kept, LaunchRefusedError, Pauses, supervise

#: A part whose life is in the settings: how it begins, and how it ends.
SERVICE = """
import asyncio, json, os, pathlib, sys, threading
sys.path[:0] = []
from kvatlas.deploy.processes import main, child
from kvatlas.deploy.processes.parts import Part
import kvatlas.bridge.errors as errors

given = json.loads(sys.stdin.buffer.readline())
mark = pathlib.Path(given["mark"])
mark.write_text((mark.read_text() if mark.exists() else "") + "x")
life = given["lives"][min(len(mark.read_text()), len(given["lives"])) - 1]


class Service:
    def __init__(self):
        self.ready = asyncio.Event()
        self.restarts = None

    def tell_restarts(self, restarts):
        self.restarts = restarts

    async def start(self):
        if life == "refused":
            raise errors.SettingsError("the listen address is taken")
        self.ready.set()

    async def run_until(self, stop):
        await asyncio.sleep(0.05)
        if life == "fails":
            raise ValueError("a task has ended")
        if life == "callback":
            asyncio.get_running_loop().call_soon(part_of_ours)
        if life == "killed":
            os.kill(os.getpid(), 9)
        await stop.wait()
        if life == "deaf":
            await asyncio.sleep(3600)

    async def stop(self):
        if life == "fails":
            await asyncio.sleep(3600)  # nothing that hangs holds the end up


def part_of_ours():
    raise KeyError("in a callback")


part_of_ours.__globals__["__name__"] = "kvatlas.part"
main._FAILED_SECONDS = 0.3


async def opened(sections, stop, prepared):
    return Service()


parts = {"part": Part((), opened, lambda service: f"part=here:1 restarts={service.restarts.total}")}
gone = child._watch_parent()
sys.exit(main.run("part", {}, tell=child._say, orphaned=gone, restarts=main.Restarts(**given["restarts"]), parts=parts))
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[[Restarts], Child]]]:
    """Makes what starts a part that lives as told, each life once and the last one again and again."""
    script = tmp_path / "part.py"
    script.write_text(SERVICE)
    monkeypatch.setattr(supervisor, "_COMMAND", (sys.executable, str(script)))
    made: list[Child] = []

    def starts(name: str, *lives: str) -> Callable[[Restarts], Child]:
        def begin(restarts: Restarts) -> Child:
            told = {"by_code": restarts.by_code, "reason": restarts.reason}
            given = {"mark": str(tmp_path / name), "lives": lives, "restarts": told}
            made.append(Child("part", given, tmp_path / f"{name}.log"))
            return made[-1]

        return begin

    yield starts
    for child in made:
        if child.process.poll() is None:
            child.process.kill()
        child.wait(time.monotonic() + 90)


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_pauses_grow_to_a_bound_and_begin_anew_after_a_long_life() -> None:
    """Twice as long each time, never longer than the bound."""
    pauses = Pauses(0.5, 4.0)
    assert [pauses.after(1.0) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert [pauses.after(seconds) for seconds in (120.0, 1.0)] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("life", "code", "reason"),
    [
        ("fails", 1, "ValueError: a task has ended"),
        ("callback", 1, "KeyError: 'in a callback'"),
        ("killed", -9, "killed by SIGKILL"),
    ],
)
def test_what_dies_is_started_again_and_told_of_it(start, life: str, code: int, reason: str) -> None:
    """An error of a task, one of a callback, and a kill: the next process knows how often and why."""
    kept = Kept("part", start("a", life, "lives"))
    eventually(lambda: kept.look() or kept.restarts.total)
    assert (kept.restarts.by_code, kept.restarts.reason) == ({str(code): 1}, reason)
    eventually(lambda: kept.look() or kept.child.said == "part=here:1 restarts=1")
    assert kept.child.address("part") == "here:1"


def test_nothing_is_started_before_its_pause_is_over(start) -> None:
    """A process that dies at once must not be started as fast as it dies."""
    now = [0.0]
    kept = Kept("part", start("a", "killed", "lives"), clock=lambda: now[0])
    eventually(lambda: kept.look() or kept.restarts.total)
    first = kept.child
    for _ in range(20):
        kept.look()
    assert kept.child is first
    now[0] = 0.5
    kept.look()
    assert kept.child is not first


def test_what_a_restart_does_not_help_is_given_up_with_its_reason(start, capsys: pytest.CaptureFixture[str]) -> None:
    """All others are stopped, the exit code is 2, and the reason is said once more at the end."""
    stop = threading.Event()
    assert supervise("part", [start("a", "lives"), start("b", "refused")], stop, lambda _: None) == 2
    assert "given up, since a restart does not help" in (said := capsys.readouterr().err)
    assert "the listen address is taken" in said
    kept = Kept("part", start("c", "refused"))
    with pytest.raises(LaunchRefusedError, match="the listen address is taken"):
        eventually(kept.look)


def test_a_stop_is_passed_on_and_an_end_of_their_own_is_seen(start) -> None:
    """Both processes are ready, one dies and comes back; the stop ends both, with 0."""
    stop, said = threading.Event(), list[str]()
    codes: list[int] = []
    starts = [start("a", "lives"), start("b", "killed", "lives")]
    running = threading.Thread(target=lambda: codes.append(supervise("part", starts, stop, said.append)))
    running.start()
    try:
        eventually(lambda: "part=here:1 restarts=1" in said and "part=here:1 restarts=0" in said)
    finally:
        stop.set()
        running.join(60)
    assert codes == [0]


def test_a_service_that_does_not_stop_ends_all_the_same(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's own deadline, or its parent's: no stop hangs."""
    monkeypatch.setattr(supervisor, "KILL_SECONDS", 0.5)
    stop = threading.Event()
    ready: list[str] = []

    def told(text: str) -> None:
        ready.append(text)
        stop.set()

    assert supervise("part", [start("a", "deaf")], stop, told) == 1
    assert ready


def test_a_process_whose_parent_is_gone_ends(start) -> None:
    """However the parent died: the pipe to it is closed then."""
    child = start("a", "lives")(Restarts())
    eventually(child.ready.is_set)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(60) == 0


def test_restarts_are_told_in_a_line() -> None:
    """How often by exit code, and the last reason, cut to a bound."""
    restarts = Restarts()
    assert restarts.note() is None
    restarts = restarts.after(1, "a").after(-9, "b").after(1, "c" * 10_000)
    assert restarts.total == 3
    note = restarts.note()
    assert note is not None
    assert note.startswith("3 (by exit code -9: 1, 1: 2); the last one because: ccc")
    assert len(note) < 600


def test_a_stopped_process_is_killed_at_its_parent_s_deadline(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP keeps a process from its own deadline; the parent still ends."""
    monkeypatch.setattr(supervisor, "KILL_SECONDS", 0.5)
    child = start("a", "lives")(Restarts())
    eventually(child.ready.is_set)
    os.kill(child.process.pid, signal.SIGSTOP)
    assert supervisor.stop_all([child]) == (["part"], [-9])
