"""Tests of the watchdog over source partitions."""

from __future__ import annotations

from collections.abc import Iterator

from faust.types import TP

from kvatlas.streams.faust_app.consumer import IdleSource, Watchdog

AT = TP("kv-events", 3)


class Source:
    """A partition whose task waits, with the topic's end and a clock, all set by the test."""

    def __init__(self) -> None:
        self.wanted: int | None = 7
        self.end: int | None = 9
        self.now = 100.0
        self.rewound: list[tuple[TP, int]] = []
        self.dog = Watchdog(
            self.waiting, lambda *_: self.end, lambda tp, at: self.rewound.append((tp, at)), lambda: self.now
        )

    def waiting(self) -> Iterator[IdleSource]:
        if self.wanted is not None:
            yield IdleSource(AT, self.wanted)

    def after(self, seconds: float) -> list[tuple[TP, int]]:
        for _ in range(round(seconds)):
            self.dog.look()
            self.now += 1.0
        return self.rewound


def test_a_partition_that_waits_for_what_the_topic_has_is_read_again() -> None:
    """After five seconds, and again after five more when it did not help."""
    source = Source()
    assert source.after(5) == []
    assert source.after(5) == [(AT, 7)]
    assert source.after(5) == [(AT, 7), (AT, 7)]
    assert source.dog.rewinds == 2


def test_a_partition_that_gets_on_is_left_alone() -> None:
    """Progress, an empty topic, an unknown end and work in the queue each start the wait anew."""
    source = Source()
    for wanted, end in ((7, 9), (8, 9), (9, 9), (9, None), (None, 20), (9, 20)):
        source.wanted, source.end = wanted, end
        assert source.after(4) == []
