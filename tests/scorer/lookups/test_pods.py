"""Tests of the tables that followers feed: pods and workers."""

from __future__ import annotations

import pytest

from kvatlas.bridge.model.events import Kind
from kvatlas.bridge.model.pod_ids import pod_key
from kvatlas.bridge.model.records import GONE, GroupSpec, PodRecord, WorkerRecord, encode
from kvatlas.bridge.model.workers import Layout, WorkerDirectory
from kvatlas.scorer.lookups.pods import PodTable

SECOND = 1_000_000_000


def put(pods: PodTable, writer: str, name: str, **fields: object) -> None:
    record = PodRecord(pod=name, writer=writer, **fields)  # type: ignore[arg-type]
    pods.apply(pod_key(writer, name), encode(record))


def test_both_writers_are_joined_and_epochs_are_the_highest():
    """The bridge's liveness and the resolver's meaning make one pod; the higher epoch counts."""
    pods = PodTable()
    put(pods, "streams", "a", epoch=5, valid_from=5, model="m", last_sequence=9)
    put(pods, "bridge", "a", epoch=7, valid_from=7, state="stale")
    assert (pods.merged["a"].valid_from, pods.merged["a"].state, pods.merged["a"].last_sequence) == (7, "stale", 9)
    assert pods.fleet.by_name["a"].valid_from == 7


def test_the_fleet_is_built_anew_only_when_a_meaning_changes():
    """A new sequence leaves the fleet as it is; a raised epoch does not; a pod that is gone leaves it."""
    pods = PodTable()
    put(pods, "streams", "a", last_sequence=1)
    fleet = pods.fleet
    put(pods, "streams", "a", last_sequence=2)
    assert pods.fleet is fleet
    put(pods, "streams", "a", last_sequence=2, epoch=3, valid_from=3)
    assert pods.fleet is not fleet
    put(pods, "bridge", "a", state=GONE)
    assert not pods.fleet.pods
    assert [record.pod for record in pods.listed(gone=True)] == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"suspect_before": 1},
        {"gpu_valid_from": 1},
        {"model": "m"},
        {"store": "s"},
        {"block_size_tokens": 32},
        {"approximate": True},
        {"chunk_tokens": 64},
        {"pairs": True},
        {"named": True},
        {"groups": {0: GroupSpec(Kind.SLIDING_WINDOW, 33, 16)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_walk_reads_of_a_pod_makes_a_new_fleet(change: dict[str, object]):
    """No meaning of a pod's blocks changes behind a fleet that is remembered."""
    pods = PodTable()
    put(pods, "streams", "a")
    before = pods.fleet
    put(pods, "streams", "a", **change)
    assert pods.fleet is not before
    assert pods.fleet.pods != before.pods


def test_late_unreadable_and_removed_records():
    """A record of an older epoch changes nothing, one that cannot be read is counted, tombstones remove the pod."""
    pods = PodTable()
    for writer in ("bridge", "streams"):
        put(pods, writer, "a", epoch=9, valid_from=9)
        put(pods, writer, "a", epoch=8, valid_from=8)
        assert (pods.merged["a"].epoch, pods.parts("a")[writer].valid_from) == (9, 9)
    pods.apply(b"streams|a", b"\xc1")
    pods.apply(b"nobody|a", b"x")
    assert pods.directory.rejected == 2
    pods.apply(b"streams|a", None)
    pods.apply(b"bridge|a", None)
    assert not pods.merged


def worker(workers: WorkerDirectory, name: str, partitions: list[int], now: int, **fields: object) -> None:
    values: dict[str, object] = {"partition_count": 4, "updated_ns": now, "expires_ns": now + 10 * SECOND} | fields
    record = WorkerRecord(worker=name, endpoint=f"{name}:1", partitions=partitions, **values)  # type: ignore[arg-type]
    workers.apply(name.encode(), encode(record))


def test_routes_prefer_the_newest_assignment_and_fall_back_to_standbys_and_expired_owners():
    """Of two claims the later generation wins; without an owner standbys are asked, then expired owners."""
    now = [100 * SECOND]
    workers = WorkerDirectory(lambda: now[0])
    worker(workers, "old", [0, 1], now[0], generation=1)
    worker(workers, "new", [1], now[0] + 1, generation=2)
    worker(workers, "copy", [], now[0], standby=[0], expires_ns=now[0] + 100 * SECOND)
    assert workers.route(0) == (("old:1",), ("copy:1",))
    assert workers.route(1).owners == ("new:1", "old:1")
    now[0] += 20 * SECOND
    assert workers.route(0) == ((), ("copy:1", "old:1"))
    assert workers.uncovered() == [0, 1, 2, 3]
    workers.apply(b"old", None)
    assert workers.route(0) == ((), ("copy:1",))


def test_a_worker_of_another_layout_is_refused():
    """Workers that count partitions or tokens differently from the newest one are not asked, and it is said."""
    workers = WorkerDirectory(lambda: 0)
    worker(workers, "w0", [0], 1)
    worker(workers, "w1", [1], 2, block_size_tokens=64)
    assert workers.layout == Layout(4, 64)
    assert list(workers.refused) == ["w0"]
    assert workers.route(0).owners == ()
