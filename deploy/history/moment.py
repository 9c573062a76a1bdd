"""Moments on a log: how people name them, and the offsets they stand for."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.kafka.ranges import Edges
from kvatlas.bridge.model.numbers import whole

FORMS: Final = (
    "earliest, latest, a time (2026-11-24T10:00:00Z, @1795464237.5, or -15m before now), offset:N (every partition), "
    "or offset:PARTITION:N[,PARTITION:N]"
)
SEQUENCE_FORM: Final = "seq:N or seq:INCARNATION:N with one --pod"
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AGO: Final = re.compile(r"-(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
#: Later than any record: Kafka takes no more than 63 bits.
_LAST_MS: Final = float(1 << 60)
_PARTITIONS_MAX: Final = 1_000_000


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a range of the log; exactly one way of naming it is set.

    Attributes:
        edge: ``earliest`` or ``latest``.
        time_ms: wall clock, ms since the epoch.
        offset: the same offset in every partition.
        offsets: partition -> offset.
        sequence: a pod's sequence; the reader finds its offset.
        incarnation: of the pod's engine that the sequence is of; -1 takes the first that gets there.
    """

    edge: str = ""
    time_ms: int | None = None
    offset: int | None = None
    offsets: dict[int, int] | None = None
    sequence: int | None = None
    incarnation: int = -1


EARLIEST: Final = Moment(edge="earliest")
LATEST: Final = Moment(edge="latest")


def parse_moment(text: str, now_ms: int, *, sequences: bool = False) -> Moment:
    """Read a moment as people write it.

    Args:
        text: see :data:`FORMS`.
        now_ms: the wall clock, for relative times.
        sequences: also take :data:`SEQUENCE_FORM`, where the caller can search a pod's records.

    Raises:
        SettingsError: the text is none of the forms.
    """
    forms = f"{FORMS}, or {SEQUENCE_FORM}" if sequences else FORMS
    kind, _, rest = text.partition(":")
    ago = _AGO.fullmatch(text)
    if text in ("earliest", "latest"):
        return Moment(edge=text)
    if sequences and kind == "seq":
        of, colon, number = rest.rpartition(":")
        sequence, incarnation = whole(number), whole(of) if colon else -1
        if sequence is not None and incarnation is not None:
            return Moment(sequence=sequence, incarnation=incarnation)
    if kind == "offset":
        return _offsets(text, rest)
    try:
        if ago:
            return _time(now_ms / 1000 - float(ago[1]) * _UNITS[ago[2]])
        if text.startswith("@"):
            return _time(float(text[1:]))
        return _time(dt.datetime.fromisoformat(text).astimezone(dt.UTC).timestamp())
    except (ValueError, OverflowError) as error:
        raise SettingsError(f"{text!r} is no moment; give {forms}") from error


def _time(seconds: float) -> Moment:
    if not math.isfinite(seconds):
        raise ValueError(seconds)
    # Kafka knows no time before 1970; the edge of the log is the same answer.
    return Moment(time_ms=round(min(max(0.0, seconds * 1000), _LAST_MS)))


def _offsets(text: str, rest: str) -> Moment:
    if (everywhere := whole(rest)) is not None:
        return Moment(offset=everywhere)
    found = {}
    for part in rest.split(","):
        place, _, number = part.partition(":")
        partition, offset = whole(place, _PARTITIONS_MAX), whole(number)
        if partition is None or offset is None:
            raise SettingsError(f"{text!r} is no moment; give {FORMS}")
        found[partition] = offset
    return Moment(offsets=found)


def offsets_at(edges: Mapping[int, Edges], moment: Moment, known: Mapping[int, int | None]) -> dict[int, int]:
    """Return the offset of each partition at a moment: the first record at or after it. Pure.

    Offsets outside what the log still holds are moved to its nearest edge.

    Args:
        edges: partition -> where it begins and ends.
        moment: the moment.
        known: of a moment by time: partition -> first offset since, as the broker says.

    Raises:
        SettingsError: the moment names a sequence, which only a pod's records can be searched for.
    """
    if moment.sequence is not None:
        raise SettingsError("a moment by sequence needs --pod")

    def wanted(number: int) -> int:
        if moment.time_ms is not None:
            at = known.get(number)
        elif moment.offsets is not None:
            at = moment.offsets.get(number)
        elif moment.offset is not None:
            at = moment.offset
        else:
            at = edges[number].first if moment.edge == "earliest" else None
        return edges[number].end if at is None else at

    return {number: min(max(wanted(number), edge.first), edge.end) for number, edge in edges.items()}
