"""`kvatlas up`: recorded engines in, their own cache hits out; it stops cleanly and says what died."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.integration import pipeline_support as support
from tests.integration.pipeline_support import RecordedEngine, Service


@pytest.fixture
def engines() -> Iterator[list[RecordedEngine]]:
    """The two recorded engines."""
    made = [RecordedEngine(pod) for pod in support.PODS]
    try:
        yield made
    finally:
        for engine in made:
            engine.close()


class Up:
    """`kvatlas up` over engines."""

    def __init__(self, folder: Path, engines: list[RecordedEngine], *words: str, **env: str) -> None:
        self.folder = folder
        flags = [engine.flag for engine in engines]
        self.service = Service(
            folder / "up.log",
            *("up", *flags, f"--state-dir={folder / 'state'}", "--scorer-listen=127.0.0.1:0", *words),
            env=env,
        )

    def ready(self) -> str:
        """Wait until scores can be asked for; returns the scorer's address."""
        return self.service.ready(180)

    def logs(self) -> str:
        """What all parts said, for a failed test."""
        return "".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.rglob("*.log"))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop it; returns its exit code."""
        self.service.signal(number)
        return self.service.wait()


@pytest.fixture
def ups() -> Iterator[list[Up]]:
    """Put every `Up` here; whatever still runs at the end is ended."""
    made: list[Up] = []
    yield made
    for up in made:
        up.service.close()


def _assert_clean_stop(up: Up, number: signal.Signals) -> None:
    children = support.children_of(up.service.process.pid)
    assert set(children) == {"worker", "bridge", "scorer"}
    assert up.stop(number) == 0, up.logs()
    assert not support.eventually(lambda: _left(children))


def _left(children: Mapping[str, int]) -> list[str]:
    return [name for name, pid in children.items() if support.running(pid)]


def test_recorded_engines_on_the_embedded_broker(engines: list[RecordedEngine], ups: list[Up], tmp_path: Path) -> None:
    """Every recorded query scores what the engine itself had cached; Ctrl-C stops it with 0."""
    up = Up(tmp_path, engines)
    ups.append(up)
    address = up.ready()
    for engine in engines:
        engine.play()
    wrong = support.eventually(lambda: support.wrong_hits(address, engines, tmp_path))
    assert not wrong, (wrong[:5], up.logs())
    _assert_clean_stop(up, signal.SIGINT)


def test_recorded_engines_on_kafka_and_again_after_a_restart(
    engines: list[RecordedEngine], ups: list[Up], tmp_path: Path, brokers: str, topic_prefix: str
) -> None:
    """On a real broker the scores are the engines' hits, also of what was published before and while it was down."""
    first, second = engines
    first.play(0, 50)  # nobody listens yet: the replay socket has it
    flags = (f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=4")
    up = Up(tmp_path, engines, *flags)
    ups.append(up)
    address = up.ready()
    first.play(50)
    second.play(0, 60)
    wrong = support.eventually(lambda: support.wrong_hits(address, [first], tmp_path))
    assert not wrong, (wrong[:5], up.logs())
    _assert_clean_stop(up, signal.SIGTERM)
    second.play(60)
    again = Up(tmp_path, engines, *flags)
    ups.append(again)
    address = again.ready()
    wrong = support.eventually(lambda: support.wrong_hits(address, engines, tmp_path))
    assert not wrong, (wrong[:5], again.logs())
    _assert_clean_stop(again, signal.SIGTERM)


@pytest.mark.parametrize("victim", ["worker", "scorer", "bridge"])
def test_a_part_that_dies_is_started_again(
    victim: str, engines: list[RecordedEngine], ups: list[Up], tmp_path: Path
) -> None:
    """After SIGKILL of a part the scores are true again, at the scorer's address of before; then all stop cleanly."""
    up = Up(tmp_path, engines)
    ups.append(up)
    address = up.ready()
    for engine in engines:
        engine.play(0, 40)
    before = support.children_of(up.service.process.pid)
    os.kill(before[victim], signal.SIGKILL)
    for engine in engines:
        engine.play(40)

    def wrong_or_away() -> list[object]:
        try:
            return [*support.wrong_hits(address, engines, tmp_path)]
        except AssertionError as error:  # no scorer, or flagged answers, while the part is away
            return [str(error)]

    wrong = support.eventually(wrong_or_away)
    assert not wrong, (wrong[:5], up.logs())
    after = support.children_of(up.service.process.pid)
    assert {name for name in before if before[name] != after[name]} == {victim}
    assert f"{victim} ended with code -9 and is started again" in up.service.tail()
    _assert_clean_stop(up, signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "part", "said"),
    [
        (
            ("--scorer-tls-certfile=/nowhere/tls.pem", "--scorer-tls-keyfile=/nowhere/tls.pem"),
            "scorer",
            "/nowhere/tls.pem: No such file",
        ),
        (("--engine=foo",), "bridge", "'foo' is neither an address"),
    ],
    ids=["certificate", "engine"],
)
def test_a_part_with_a_wrong_setting_is_named_at_once(
    ups: list[Up], tmp_path: Path, words: tuple[str, ...], part: str, said: str
) -> None:
    """A part that refuses its settings ends `up` with code 2 and its own message, not with one of a time limit."""
    up = Up(tmp_path, [], *words)
    ups.append(up)
    assert up.service.wait() == 2
    assert f"the {part} ended by itself" in up.service.tail()
    assert said in up.service.tail()


def test_a_killed_launcher_takes_its_parts_along(ups: list[Up], tmp_path: Path) -> None:
    """After SIGKILL of `up` no part keeps running."""
    up = Up(tmp_path, [])
    ups.append(up)
    up.ready()
    children = support.children_of(up.service.process.pid)
    up.service.kill()
    assert not support.eventually(lambda: _left(children))


@pytest.mark.parametrize("source", ["file", "environment"])
def test_brokers_from_file_or_environment_are_used(source: str, ups: list[Up], tmp_path: Path) -> None:
    """Brokers that a file or the environment gives are used; the embedded broker does not stand in for them."""
    config = tmp_path / "kvatlas.toml"
    config.write_text('[kafka]\nbrokers = "127.0.0.1:1"\n' if source == "file" else "")
    env = {} if source == "file" else {"KVATLAS_KAFKA_BROKERS": "127.0.0.1:1"}
    up = Up(tmp_path, [], f"--config={config}", **env)
    ups.append(up)
    assert up.service.wait(150) == 1
    assert "127.0.0.1:1" in up.service.tail()


def test_a_stop_during_the_start_is_clean(ups: list[Up], tmp_path: Path) -> None:
    """SIGTERM before it is ready ends it with 0 and leaves nothing behind."""
    up = Up(tmp_path, [])
    ups.append(up)
    pid = up.service.process.pid
    support.eventually(lambda: len(support.children_of(pid)) < 3, every=0.05)
    children = support.children_of(pid)
    assert up.stop() == 0, up.logs()
    assert len(children) == 3
    assert not support.eventually(lambda: _left(children))
