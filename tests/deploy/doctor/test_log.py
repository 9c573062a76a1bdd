"""How far behind the log its readers are."""

from __future__ import annotations

import pytest

from kvatlas.bridge.model.records import PodRecord, WorkerRecord
from kvatlas.deploy.doctor.log import taken, unapplied, unread

_FIRST, _SECOND = 1 << 32, 2 << 32


@pytest.mark.parametrize(
    ("sent", "applied", "behind"),
    [
        ((_FIRST, 9), (_FIRST, 9), 0),
        ((_FIRST, 9), (_FIRST + 5, 6), 3),
        ((_FIRST, 9), (_FIRST, 12), 0),
        ((_SECOND, 2), (_FIRST, 900), 3),
        ((_FIRST, 900), (_SECOND, 2), 0),
        ((_FIRST, 9), None, 10),
        ((_FIRST, -1), None, 0),
    ],
)
def test_messages_of_a_pod_that_are_not_applied(
    sent: tuple[int, int], applied: tuple[int, int] | None, behind: int
) -> None:
    """A restart counts from its own first message; a bridge's record may be the older one."""

    def record(epoch: int, sequence: int) -> PodRecord:
        return PodRecord(pod="p", writer="bridge", epoch=epoch, last_sequence=sequence)

    assert unapplied(record(*sent), record(*applied) if applied else None) == behind


def test_records_that_a_worker_has_not_applied() -> None:
    """Of its own partitions, and only those that are there; others are lost to it, unless it never asked for them."""
    worker = WorkerRecord(worker="w", endpoint="w:1", partitions=[0, 1, 2, 3], offsets={0: 4, 1: 9, 2: 3, 7: 0})
    starts, ends = {0: 0, 1: 10, 2: 6, 3: 50, 7: 9}, {0: 8, 1: 10, 2: 9, 3: 50, 7: 99}
    assert unread(worker, starts, ends) == 3 + 0 + 3 + 0
    assert taken(worker, starts) == 2
