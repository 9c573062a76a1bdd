"""What was seen of an engine, judged; tests of the whole are in test_table."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvatlas.bridge.engines.facts import EngineFacts, EventSource
from kvatlas.bridge.model.events import Kind
from kvatlas.deploy.doctor.engine import EngineSeen, SourceSeen
from kvatlas.deploy.doctor.engine_checks import judge


def wrong(seen: EngineSeen, size: int = 16) -> set[tuple[str, str]]:
    """Return the checks that are not in order."""
    return {(finding.check, finding.state) for finding in judge(seen, size) if finding.state in ("warn", "fail")}


def seen_with(**changes: Any) -> EngineSeen:
    """Return what is seen of an engine in order, changed."""
    source = EventSource(rank=0, live="tcp://h:1", replay="tcp://h:2", topic="kv@p@m")
    facts = {"url": "http://h:8", "engine": "vllm", "version": "0.33.0", "models": ("m",), "sources": (source,)}
    over = changes.pop("over", None)
    facts |= {"block_size_tokens": 16, "prefix_caching": True, "page": "vllm:num_requests_running 0\n"} | changes.pop(
        "facts", {}
    )
    one = SourceSeen(source, connected=True, replayed=3, sequences=[4, 5, 6], clock_seconds=0.1)
    for name, value in changes.items():
        setattr(one, name, value)
    return EngineSeen("http://h:8", EngineFacts(**facts), sources=[one], over_tokens=over)


_SPECULATION = ("speculation", "warn")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"sequences": [4, 7]}, {("sequence", "fail")}),
        ({"sequences": [4, 5, 0]}, {("sequence", "fail")}),
        ({"groups": {0: None}}, set()),
        ({"groups": {0: Kind.FULL, 1: Kind.MAMBA}}, set()),
        ({"groups": {0: Kind.FULL, 1: None}}, {("hybrid", "warn")}),
        ({"clock_seconds": -30.0}, {("clock", "warn")}),
        ({"facts": {"engine": "sglang", "version": "0.5.17"}}, {("salts", "warn"), ("adapters", "warn")}),
        ({"facts": {"engine": "sglang", "version": "0.5.22"}}, {("adapters", "warn")}),
        ({"facts": {"version": "0.14.0"}}, {("salts", "warn")}),
        ({"facts": {"version": ""}}, set()),
        ({"plain": 3, "facts": {"engine": "sglang", "version": "0.5.23", "speculation": "EAGLE"}}, {_SPECULATION}),
        ({"plain": 3, "facts": {"engine": "sglang", "version": "0.5.23", "speculation": "NGRAM"}}, set()),
        ({"paired": 3, "facts": {"engine": "sglang", "version": "0.5.23", "speculation": "EAGLE"}}, set()),
        ({"facts": {"engine": "sglang", "version": "0.5.23"}}, set()),
        ({"over": 16, "facts": {"speculation": "mtp"}}, {_SPECULATION}),
        ({"over": 0, "facts": {"speculation": "mtp"}}, set()),
        ({"over": 0, "facts": {"speculation": "on"}}, set()),
        ({"facts": {"speculation": "on"}}, set()),
        ({"facts": {"prefix_caching": None, "block_size_tokens": None}}, set()),
    ],
)
def test_what_was_seen_is_judged(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    """What cannot be looked at is no finding of harm."""
    assert wrong(seen_with(**changes)) == expected


def test_a_message_is_noted_with_its_clock() -> None:
    """Clock against ours, in seconds."""
    seen = SourceSeen(EventSource(rank=0, live="tcp://h:1"))
    seen.heard(0, b"\xc1", "vllm", time.time())
    assert len(seen.unreadable) == 1
    assert seen.clock_seconds is None
