"""Tests of the audit's comparison."""

from __future__ import annotations

import pytest

from kvatlas.bridge.model import pod_ids
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import PodRecord
from kvatlas.deploy.audit.audit import compare, read_truth
from kvatlas.streams.errors import StreamsError
from kvatlas.streams.index.holders import add_holder, pack_holder

K1, K2, K3 = (bytes([number]) * 16 for number in (1, 2, 3))


def held(pod: str, clears: int = 0, tier: Tier = Tier.GPU) -> bytes:
    return pack_holder(pod_ref(pod), 0, int(tier), 0, 0, epoch_of(1, clears))


def record(pod: str, **fields: int) -> PodRecord:
    return PodRecord(pod=pod, writer=pod_ids.WRITER_STREAMS, epoch=epoch_of(1), **fields)


def test_ghosts_and_missing_are_found_per_tier() -> None:
    """A block on the wrong tier is a ghost there and missing on the right one."""
    index = {K1: held("a"), K2: add_holder(held("a"), held("a", tier=Tier.CPU)), K3: held("a")}
    truth = {"a": {"gpu": frozenset([K1, K2]), "cpu": frozenset([K2, K3])}}
    (found,) = compare(index, truth, [record("a")])
    assert (found.held, found.ghosts, found.missing) == (4, 1, 1)
    assert found.examples == [f"ghost gpu {K3.hex()}", f"missing cpu {K3.hex()}"]


def test_holders_of_ended_epochs_do_not_exist() -> None:
    """After a clear nothing of before is a ghost."""
    (found,) = compare({K1: held("a")}, {"a": {}}, [record("a", valid_from=epoch_of(1, 1))])
    assert (found.ghosts, found.missing) == (0, 0)


def test_suspect_ghosts_are_counted_apart() -> None:
    """What a gap made suspect is flagged to readers, so it is no ghost."""
    (found,) = compare({K1: held("a")}, {"a": {}}, [record("a", suspect_before=epoch_of(2))])
    assert (found.ghosts, found.suspect_ghosts) == (0, 1)


def test_a_pod_that_the_truth_does_not_know_holds_ghosts() -> None:
    """The audit looks at pods from both sides."""
    found = compare({K1: held("b")}, {"a": {"gpu": frozenset([K1])}}, [record("a"), record("b")])
    assert [(pod.pod, pod.ghosts, pod.missing) for pod in found] == [("a", 0, 1), ("b", 1, 0)]


def test_a_truth_that_is_something_else_is_refused() -> None:
    """Hexadecimal block keys by pod and tier, or an error that says so."""
    assert read_truth(b'{"a": {"gpu": ["0102"]}}') == {"a": {"gpu": frozenset([b"\x01\x02"])}}
    for document in (b"{", b'{"a": ["x"]}', b'{"a": {"gpu": ["zz"]}}'):
        with pytest.raises(StreamsError, match="truth"):
            read_truth(document)
