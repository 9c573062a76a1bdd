"""Recorded engines played while one kind of process is killed again and again: in the end every answer is theirs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.integration import pipeline_support as support
from tests.integration.pipeline_support import RecordedEngine, Service

_KILLS = 5
#: The longest life of a process before it is killed: from its first imports to well after it has begun to work.
_LIFE_SECONDS = 12.0
_WAIT_SECONDS = 150.0
#: Longer recordings are played several messages at a time.
_STEPS = 200


@pytest.fixture
def engines() -> Iterator[list[RecordedEngine]]:
    """All recorded engines."""
    made = [RecordedEngine(name) for name in support.RECORDINGS]
    yield made
    for engine in made:
        engine.close()


def _other_than(pid: int, launcher: int, victim: str) -> int:
    """Wait for the victim's process that is not the one that was killed."""
    found: dict[str, int] = {}

    def missing() -> bool:
        found.update(support.children_of(launcher))
        return found.get(victim, pid) == pid

    assert not support.eventually(missing, _WAIT_SECONDS, every=0.05)
    return found[victim]


def _play(engines: list[RecordedEngine], rng: random.Random) -> list[tuple[RecordedEngine, int, int]]:
    """Return the steps in which the recordings are published, pods in random order: engine, first and last message."""
    steps: list[list[tuple[RecordedEngine, int, int]]] = []
    for engine in engines:
        count = len(engine.payloads)
        each = -(-count // _STEPS)
        steps.append([(engine, first, first + each) for first in range(0, count, each)][::-1])
    order = [own for own in steps for _ in own]
    rng.shuffle(order)
    return [own.pop() for own in order]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["worker", "bridge", "scorer"])
def test_recordings_score_as_their_engines_said_after_random_kills(
    victim: str, engines: list[RecordedEngine], tmp_path: Path, brokers: str, topic_prefix: str
) -> None:
    """SIGKILL at random moments of a part, with messages before, between and after: all hits are the engines'."""
    rng = random.Random(victim)
    up = Service(
        tmp_path / "up.log",
        *("up", *(engine.flag for engine in engines), f"--state-dir={tmp_path / 'state'}"),
        *(f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=4", "--scorer-listen=127.0.0.1:0"),
    )
    try:
        address = up.ready(_WAIT_SECONDS)
        steps = iter(all_steps := _play(engines, rng))
        count = len(all_steps) // (_KILLS + 1)
        pid = 0
        for _ in range(_KILLS):
            pid = _other_than(pid, up.process.pid, victim)
            life = rng.uniform(0.0, _LIFE_SECONDS)
            for engine, first, last in islice(steps, count):
                engine.play(first, last)
                time.sleep(life / count)
            os.kill(pid, signal.SIGKILL)
        for engine, first, last in steps:
            engine.play(first, last)

        def wrong() -> list[object]:
            try:
                return [*support.wrong_hits(address, engines, tmp_path)]
            except AssertionError as error:  # no scorer, or partial answers, while the part is away
                return [str(error)]

        found = support.eventually(wrong, _WAIT_SECONDS)
        logs = [path.read_text()[-2000:] for path in (tmp_path / "state").glob("*.log")]
        assert not found, (found[:5], up.tail(), *logs)
        assert f"restart {_KILLS})" in up.log.read_text()
        assert set(support.children_of(up.process.pid)) == {"worker", "bridge", "scorer"}
        up.signal(signal.SIGTERM)
        assert up.wait() == 0, up.tail()
    finally:
        up.close()
