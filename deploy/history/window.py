"""Which part of a log is read: two moments as offsets on Kafka, or as a test of the records of a capture."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.deploy.history.log import LogReader, Range, Record, find_record
from kvatlas.deploy.history.moment import LATEST, Moment
from kvatlas.deploy.history.summary import number_of


class Reached:
    """Matches a pod's first record at or past a sequence: of the incarnation named, or of the first that gets there."""

    def __init__(self, pod: str, sequence: int, incarnation: int) -> None:
        self._pod, self._wanted, self._incarnation = pod.encode(), sequence, incarnation

    def __call__(self, record: Record) -> bool:
        """Tell whether the record is there."""
        if record.key != self._pod:
            return False
        headers = dict(record.headers)
        sequence, incarnation = (number_of(headers.get(name)) for name in (topics.H_SEQUENCE, topics.H_INCARNATION))
        if self._incarnation >= 0 and incarnation != self._incarnation:
            return incarnation > self._incarnation
        return sequence >= self._wanted


def reached(moment: Moment, pods: Sequence[str], topic: str) -> Reached | None:
    """Return what finds a moment by sequence; None for any other moment.

    Raises:
        SettingsError: it is one, and not exactly one pod of ``kv-events`` is read.
    """
    if moment.sequence is None:
        return None
    if len(pods) != 1 or topic != topics.EVENTS:
        raise SettingsError("a moment by sequence needs exactly one --pod and the topic kv-events")
    return Reached(pods[0], moment.sequence, moment.incarnation)


async def range_of(
    reader: LogReader,
    topic: str,
    since: Moment,
    until: Moment,
    *,
    pods: Sequence[str] = (),
    only: Collection[int] | None = None,
) -> Range:
    """Turn two moments into offsets; a sequence is searched for in the pod's partition.

    Raises:
        SettingsError: a moment by sequence does not fit pods and topic.
        LogError: Kafka does not answer, or the topic does not exist.
    """
    first, last = (reached(moment, pods, topic) for moment in (since, until))
    if first is None and last is None:
        return await reader.range(topic, since, until, only)
    partition = pod_ids.pod_partition(pods[0], len(await reader.partitions(topic)))
    if first is not None:
        since = await _found(reader, topic, partition, Moment(edge="earliest"), first)
    if last is not None:
        # From where the range begins: the pod may have passed this sequence before, in an earlier life.
        until = await _found(reader, topic, partition, since, last)
    return await reader.range(topic, since, until, [partition])


async def _found(reader: LogReader, topic: str, partition: int, since: Moment, wanted: Reached) -> Moment:
    span = await reader.range(topic, since, LATEST, [partition])
    return Moment(offsets={partition: await find_record(reader, span, wanted)})


class Window:
    """The same two moments over the records of a capture, which come in the order of a log."""

    def __init__(self, topic: str, since: Moment, until: Moment, pods: Sequence[str] = ()) -> None:
        """Describe the window.

        Raises:
            SettingsError: a moment by sequence does not fit pods and topic.
        """
        self._since, self._until = since, until
        self._first, self._last = (reached(moment, pods, topic) for moment in (since, until))
        self._open, self._closed = self._first is None, False

    def holds(self, record: Record) -> bool:
        """Tell whether the next record lies in the window."""
        self._open = self._open or (self._first is not None and self._first(record))
        if self._open and self._last is not None:
            self._closed = self._closed or self._last(record)
        return self._open and not self._closed and _after(self._since, record) and not _past(self._until, record)


def _after(since: Moment, record: Record) -> bool:
    if since.offsets is not None:  # partitions that are not named are left out, as on Kafka
        return record.partition in since.offsets and record.offset >= since.offsets[record.partition]
    return since.edge != "latest" and _reaches(since, record)


def _past(until: Moment, record: Record) -> bool:
    if until.offsets is not None:
        return record.partition in until.offsets and record.offset >= until.offsets[record.partition]
    if until.sequence is not None:
        return False
    return until.edge == "earliest" or (until.edge != "latest" and _reaches(until, record))


def _reaches(moment: Moment, record: Record) -> bool:
    if moment.time_ms is not None:
        return record.timestamp_ms >= moment.time_ms
    return moment.offset is None or record.offset >= moment.offset
