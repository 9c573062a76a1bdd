"""Where a pod's stream goes on, from what the log says of it."""

from __future__ import annotations

import math

import msgspec
import pytest

from kvatlas.bridge.ingest.messages import StreamPosition
from kvatlas.bridge.ingest.recovered import Recovered, event_ns, fold, read_ts
from kvatlas.bridge.model import records


def _control(**fields: object) -> bytes:
    return msgspec.msgpack.encode({"v": 1, **fields})


def _take(pods: dict[str, Recovered], offset: int, value: bytes, **headers: bytes) -> None:
    fold(pods, b"p", value, headers, (0, offset))


@pytest.mark.parametrize(
    ("seconds", "ns"),
    [(None, 0), (1.5, 1_500_000_000), (math.nan, 0), (math.inf, 0), (-math.inf, 0), (-1.0, 0), (1e300, 0)],
)
def test_a_clock_that_says_nonsense_says_nothing(seconds: float | None, ns: int) -> None:
    """An engine's clock is any double; what is no moment counts as none, and fits the record in any case."""
    assert event_ns(seconds) == ns
    assert records.encode(records.PodRecord(pod="p", writer="bridge", last_event_ns=event_ns(seconds)))


def test_a_message_without_a_moment_on_the_log_is_read_back() -> None:
    """It counts by its sequence like any other."""
    pods: dict[str, Recovered] = {}
    _take(pods, 0, _control(type="start", incarnation=5), content_type=b"control", incarnation=b"5")
    payload = msgspec.msgpack.encode((math.nan, [], 0))
    assert math.isnan(read_ts(payload) or 0.0)
    _take(pods, 1, payload, content_type=b"engine", incarnation=b"5", sequence=b"3")
    assert (pods["p"].record.last_sequence, pods["p"].record.last_event_ns) == (3, 0)
    assert pods["p"].ahead


@pytest.mark.parametrize(
    "headers", [{"incarnation": b"x"}, {"incarnation": b"5", "sequence": b""}, {"receive_ns": b"\xff"}]
)
def test_a_record_that_is_not_ours_is_passed_over(headers: dict[str, bytes]) -> None:
    """Whoever wrote it: it names no pod and ends no start."""
    pods: dict[str, Recovered] = {}
    fold(pods, b"stranger", b"junk", headers, (0, 0))
    assert pods == {}


def test_behind_a_gap_the_last_clock_is_not_the_one_of_the_last_sequence() -> None:
    """The record keeps the clock of the message before the gap, so it must not judge what follows."""
    pods: dict[str, Recovered] = {}
    _take(pods, 0, _control(type="start", incarnation=5), content_type=b"control", incarnation=b"5")
    payload = msgspec.msgpack.encode((7.0, [], 0))
    _take(pods, 1, payload, content_type=b"engine", incarnation=b"5", sequence=b"3")
    assert pods["p"].position().ts == 7.0
    gap = _control(type="gap", incarnation=6, first_lost=4, last_lost=6)
    _take(pods, 2, gap, content_type=b"control", incarnation=b"6")
    position = pods["p"].position()
    assert position._replace(digests=()) == StreamPosition(6, 6, 0.0)
