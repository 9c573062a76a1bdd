"""Moments on a log: how people name them, and the offsets they stand for."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from typing import Final

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition

from kvatlas.bridge.errors import SettingsError

FORMS: Final = (
    "earliest, latest, a time (2026-11-24T10:00:00Z, @1795464237.5, or -15m before now), offset:N (every partition), "
    "offset:PARTITION:N[,PARTITION:N], or seq:N with --pod"
)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AGO: Final = re.compile(r"-(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a range of the log; exactly one way of naming it is set.

    Attributes:
        edge: ``earliest`` or ``latest``.
        time_ms: wall clock, ms since the epoch.
        offset: the same offset in every partition.
        offsets: partition -> offset.
        sequence: a pod's sequence; the reader finds its offset.
    """

    edge: str = ""
    time_ms: int | None = None
    offset: int | None = None
    offsets: dict[int, int] | None = None
    sequence: int | None = None


EARLIEST: Final = Moment(edge="earliest")
LATEST: Final = Moment(edge="latest")


def parse_moment(text: str, now_ms: int) -> Moment:
    """Read a moment as people write it.

    Args:
        text: see :data:`FORMS`.
        now_ms: the wall clock, for relative times.

    Raises:
        SettingsError: the text is none of the forms.
    """
    kind, _, rest = text.partition(":")
    ago = _AGO.fullmatch(text)
    if text in ("earliest", "latest"):
        return Moment(edge=text)
    if ago:
        return Moment(time_ms=now_ms - int(float(ago[1]) * _UNITS[ago[2]] * 1000))
    if kind == "seq" and rest.isdecimal():
        return Moment(sequence=int(rest))
    if kind == "offset":
        return _offsets(text, rest)
    try:
        if text.startswith("@"):
            return Moment(time_ms=int(float(text[1:]) * 1000))
        found = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(f"{text!r} is no moment; give {FORMS}") from error
    return Moment(time_ms=int(found.astimezone(dt.UTC).timestamp() * 1000))


def _offsets(text: str, rest: str) -> Moment:
    if rest.isdecimal():
        return Moment(offset=int(rest))
    pairs = [part.split(":") for part in rest.split(",")]
    if not all(len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() for pair in pairs):
        raise SettingsError(f"{text!r} is no moment; give {FORMS}")
    return Moment(offsets={int(partition): int(offset) for partition, offset in pairs})


async def offsets_at(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], moment: Moment
) -> dict[TopicPartition, int]:
    """Return the offset of each partition at a moment: the first record at or after it.

    Offsets outside what the log still holds are moved to its nearest edge.

    Raises:
        SettingsError: the moment names a sequence, which only a pod's records can be searched for.
    """
    first = await consumer.beginning_offsets(list(partitions))
    last = await consumer.end_offsets(list(partitions))
    if moment.sequence is not None:
        raise SettingsError("a moment by sequence needs --pod")
    if moment.time_ms is not None:
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, moment.time_ms))
        wanted = {tp: found[tp].offset if found.get(tp) else last[tp] for tp in partitions}
    elif moment.offsets is not None:
        wanted = {tp: moment.offsets.get(tp.partition, last[tp]) for tp in partitions}
    elif moment.offset is not None:
        wanted = dict.fromkeys(partitions, moment.offset)
    else:
        wanted = {tp: (first if moment.edge == "earliest" else last)[tp] for tp in partitions}
    return {tp: min(max(wanted[tp], first[tp]), last[tp]) for tp in partitions}
