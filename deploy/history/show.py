"""Records as people and scripts read them: a line of text or one JSON object."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import msgspec

from kvatlas.bridge import records
from kvatlas.bridge.errors import WireError
from kvatlas.bridge.events import Tier
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.summary import MessageLine
from kvatlas.streams.codec import HOLDER, OP_ADD, decode_blocks

EVENTS_HEAD = f"{'time':<13}{'where':>12}  {'pod':<20}{'sequence':>9} {'event':<11}{'blocks':>7}{'tokens':>8}  what"


def clock(timestamp_ms: int) -> str:
    """Return the time of day (UTC) in ms."""
    found = dt.datetime.fromtimestamp(timestamp_ms / 1000, dt.UTC)
    return f"{found:%H:%M:%S}.{timestamp_ms % 1000:03d}"


def event_rows(line: MessageLine) -> list[str]:
    """Return one row per event of a message; a message without events is one row."""
    where = f"{line.partition}/{line.offset}"
    head = f"{clock(line.timestamp_ms):<13}{where:>12}  {line.pod:<20}{line.sequence:>9} "
    rows = []
    for event in line.events:
        chain = f"{event.first}" + (f"..{event.last}" if event.blocks > 1 else "")
        parent = f" after {event.parent}" if event.parent else ""
        place = f"{event.tier}" + (f"/group {event.group}" if event.group else "")
        what = " ".join(part for part in (place, chain + parent, event.lora, event.detail) if part)
        rows.append(f"{head}{event.type:<11}{event.blocks or '':>7}{event.tokens or '':>8}  {what}")
    return rows or [f"{head}{'(none)':<11}"]


def describe(record: Record) -> dict[str, Any]:
    """Return any record of ours as a JSON-ready object; what cannot be read says why under ``error``."""
    found: dict[str, Any] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp_ms": record.timestamp_ms,
        "key": (record.key or b"").decode(errors="backslashreplace"),
    }
    if record.value is None:
        return {**found, "tombstone": True}
    try:
        return {**found, **_value(record)}
    except WireError as error:
        return {**found, "error": str(error)}


def _value(record: Record) -> dict[str, Any]:
    value = record.value or b""
    if record.topic == records.BLOCKS:
        return _blocks(value)
    if record.topic == records.PODS:
        return {"pod": msgspec.to_builtins(records.decode(records.PodRecord, value), str_keys=True)}
    if record.topic == records.WORKERS:
        return {"worker": msgspec.to_builtins(records.decode(records.WorkerRecord, value), str_keys=True)}
    if record.topic == records.DECISIONS:
        decision = records.decode(records.DecisionRecord, value)
        fields = msgspec.to_builtins(msgspec.structs.replace(decision, keys=b""), str_keys=True)
        return {"decision": {**fields, "keys": None, "blocks": len(decision.keys) // 16}}
    headers = {name: text.decode(errors="backslashreplace") for name, text in record.headers}
    return {"headers": headers, "bytes": len(value)}


def _blocks(value: bytes) -> dict[str, Any]:
    found = decode_blocks(value)
    tiers = Counter(Tier(fields[2]).name.lower() for fields in HOLDER.iter_unpack(found.holders) if fields[2] in _TIERS)
    added = found.ops.count(OP_ADD)
    return {
        "added": added,
        "removed": len(found.ops) - added,
        "tiers": dict(tiers),
        "receive_ns": found.receive_ns,
        "runs": [
            {
                "pod_ref": f"{run.pod_ref:016x}",
                "epoch": run.epoch,
                "first_sequence": run.first_sequence,
                "last_sequence": run.last_sequence,
                "updates": run.updates,
            }
            for run in found.runs
        ],
    }


_TIERS = frozenset(int(tier) for tier in Tier)
