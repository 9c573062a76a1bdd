"""The directory of pods, and what may be forgotten of it."""

from __future__ import annotations

from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import PodRecord

HOUR = 3_600_000_000_000


def book_of(*told: PodRecord) -> PodDirectory:
    book = PodDirectory()
    for record in told:
        book.apply(pod_ids.pod_key(record.writer, record.pod), records.encode(record))
    return book


def bridge(pod: str, state: str, updated_ns: int, incarnation: int = 3) -> PodRecord:
    epoch = epoch_of(incarnation)
    return PodRecord(pod=pod, writer="bridge", state=state, epoch=epoch, valid_from=epoch, updated_ns=updated_ns)


def streams(pod: str, updated_ns: int, incarnation: int = 3) -> PodRecord:
    epoch = epoch_of(incarnation, 2)
    return PodRecord(pod=pod, writer="streams", state="gone", epoch=epoch, valid_from=epoch, updated_ns=updated_ns)


def test_pods_that_are_gone_for_long_may_be_forgotten() -> None:
    """By the bridge's word, and only when neither writer has said anything since; with their incarnation."""
    book = book_of(
        bridge("long", "gone", 1 * HOUR),
        streams("long", 1 * HOUR),
        bridge("alone", "gone", 1 * HOUR, incarnation=9),
        bridge("lately", "gone", 9 * HOUR),
        bridge("late-events", "gone", 1 * HOUR),
        streams("late-events", 9 * HOUR),
        bridge("live", "live", 1 * HOUR),
        bridge("stale", "stale", 1 * HOUR),
        streams("unknown-to-the-bridge", 1 * HOUR),
    )
    assert book.gone_since(5 * HOUR) == {pod_ref("long"): 3, pod_ref("alone"): 9}
    assert book.names()[pod_ref("alone")] == "alone"


def test_what_is_late_of_a_forgotten_pod_does_not_bring_it_back() -> None:
    """With the streams record gone, the bridge's still ends every older epoch, whatever a late record says."""
    book = book_of(bridge("p", "gone", 1 * HOUR, incarnation=4), streams("p", 1 * HOUR))
    book.apply(pod_ids.pod_key("streams", "p"), None)
    late = PodRecord(pod="p", writer="streams", epoch=epoch_of(2), valid_from=epoch_of(2), updated_ns=9 * HOUR)
    book.apply(pod_ids.pod_key("streams", "p"), records.encode(late))
    merged = book.merged["p"]
    assert (merged.state, merged.valid_from) == ("gone", epoch_of(4))


def test_a_late_record_of_an_earlier_owner_moves_no_bound_back() -> None:
    """Epochs only grow: a record of a lower one is from a former owner of the pod, and the sweep must not trust it."""
    newer, older = streams("p", 2 * HOUR, incarnation=5), streams("p", 9 * HOUR, incarnation=4)
    book = book_of(newer, older)
    assert book.merged["p"] == newer
    assert book.ended() == {pod_ref("p"): newer.ended}
    book.apply(pod_ids.pod_key("streams", "p"), None)
    book.apply(pod_ids.pod_key("streams", "p"), records.encode(older))
    assert book.merged["p"] == older
