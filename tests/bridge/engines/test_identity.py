"""Whose message it is: topic, spec and rank."""

from __future__ import annotations

import pytest

from kvatlas.bridge.engines.identity import Identity, identify, parse_topic
from kvatlas.bridge.engines.spec import EngineSpec

_LIVE = "tcp://10.0.0.1:5557"


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        (b"kv@pod-a@llama", ("pod-a", "llama")),
        (b"kv@pod-a@org/model@rev", ("pod-a", "org/model@rev")),
        (b"kv@pod-a@", ("pod-a", "")),
        (b"", None),
        (b"kv@@model", None),
        (b"kv-events", None),
        (b"other@pod@model", None),
        (b"kv@\xff@m", None),
        (b"kv@po\nd@m", None),
        (b"kv@" + b"p" * 600 + b"@m", None),
    ],
)
def test_a_topic_names_pod_and_model_or_nobody(topic: bytes, expected: tuple[str, str] | None) -> None:
    """`kv@pod@model` is split at its first two signs; any other topic names nobody."""
    assert parse_topic(topic) == expected


@pytest.mark.parametrize(
    ("topic", "rank", "spec", "expected"),
    [
        (b"kv@a@m", None, EngineSpec(live=_LIVE, pod="b", model="n"), Identity("a", "m", 0)),
        (b"kv@a@", None, EngineSpec(live=_LIVE, model="n"), Identity("a", "n", 0)),
        (b"", None, EngineSpec(live=_LIVE, pod="b", model="n"), Identity("b", "n", 0)),
        (b"", None, EngineSpec(live=_LIVE), Identity("10.0.0.1:5557", "", 0)),
        (b"", 3, EngineSpec(live=_LIVE), Identity("10.0.0.1:5557", "", 0)),
        (b"kv@a@m", 3, EngineSpec(live=_LIVE), Identity("a@dp3", "m", 3)),
        (b"kv@a@m", 0, EngineSpec(live=_LIVE), Identity("a", "m", 0)),
        (b"kv@a@m", 0, EngineSpec(live=_LIVE, rank=0, ranks=2), Identity("a@dp0", "m", 0)),
        (b"", 0, EngineSpec(live=_LIVE, pod="b", rank=1, ranks=2), Identity("b@dp1", "", 1)),
    ],
)
def test_topic_then_spec_then_address_name_the_pod(
    topic: bytes, rank: int | None, spec: EngineSpec, expected: Identity
) -> None:
    """The topic's names win, then the spec's, then the address; each rank of several is a pod of its own."""
    assert identify(topic, rank, spec) == expected
