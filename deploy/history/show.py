"""Records as people and scripts read them: a line of text or one JSON object."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.events import Tier
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.summary import MessageLine
from kvatlas.streams.index.blocks_record import OP_ADD, decode_blocks
from kvatlas.streams.index.holders import HOLDER

_PLACE = f"{'time':<13}{'where':>12}  "
#: Topic -> the line above its rows.
HEADS = {
    topics.EVENTS: f"{_PLACE}{'pod':<20}{'sequence':>9} {'event':<11}{'blocks':>7}{'tokens':>8}  what",
    topics.BLOCKS: f"{_PLACE}{'added':>7}{'removed':>9}  {'tiers':<20}pod reference, epoch: sequences (updates)",
    topics.DECISIONS: f"{_PLACE}{'request':<24}{'kind':<10}{'pod':<20}{'predicted':>10}{'real':>6}  what",
    topics.PODS: f"{_PLACE}{'pod':<20}{'writer':<16}{'state':<7}{'epoch':>14}{'sequence':>10}{'lost':>6}  model",
    topics.WORKERS: f"{_PLACE}{'worker':<24}{'serves':>7}{'standby':>8}{'restoring':>10}  endpoint",
    topics.DLQ: f"{_PLACE}{'pod':<20}{'bytes':>8}  reason",
}


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


def row(record: Record) -> str:
    """Return one line of a record of any topic but ``kv-events``, as :data:`HEADS` has the columns."""
    found = describe(record)
    head = f"{clock(record.timestamp_ms):<13}{f'{record.partition}/{record.offset}':>12}  "
    if "tombstone" in found:
        return f"{head}{found['key']:<20}(deleted)"
    if "error" in found:
        return f"{head}{found['key']:<20}unreadable: {found['error']}"
    return head + _ROWS[record.topic](found)


def _block_row(found: dict[str, Any]) -> str:
    tiers = " ".join(f"{tier}={count}" for tier, count in found["tiers"].items())
    runs = ", ".join(
        f"{run['pod_ref']}, {epoch(run['epoch'])}: {run['first_sequence']}..{run['last_sequence']} ({run['updates']})"
        for run in found["runs"]
    )
    return f"{found['added']:>7}{found['removed']:>9}  {tiers:<20}{runs}"


def _decision_row(found: dict[str, Any]) -> str:
    one = found["decision"]
    real = one["real_blocks"] if one["real_blocks"] >= 0 else ""
    blocks = f"of {one['blocks']} blocks" if one["blocks"] else ""
    sessions = f"{len(one['sessions'])} sessions" if one["sessions"] else ""
    what = " ".join(filter(None, (one["outcome"], one["policy"], blocks, sessions)))
    head = f"{one['request_id']:<24}{one['kind']:<10}{one['pod']:<20}"
    return f"{head}{one['predicted_blocks']:>10}{real:>6}  {what}".rstrip()


def _pod_row(found: dict[str, Any]) -> str:
    pod = found["pod"]
    return (
        f"{pod['pod']:<20}{found['key'].rpartition('|')[0]:<16}{pod['state']:<7}{epoch(pod['epoch']):>14}"
        f"{pod['last_sequence']:>10}{pod['lost']:>6}  {pod['model']}"
    )


def _worker_row(found: dict[str, Any]) -> str:
    if "worker" not in found:
        catalog = found["catalog"]
        return f"index versions {', '.join(catalog['versions'])}; {catalog['active']} answers"
    one = found["worker"]
    counts = f"{len(one['partitions']):>7}{len(one['standby']):>8}{len(one['restoring']):>10}"
    return f"{one['worker']:<24}{counts}  {one['endpoint']}"


def _dlq_row(found: dict[str, Any]) -> str:
    reason, origin = (found["headers"].get(name, "") for name in (topics.H_REASON, topics.H_ORIGIN))
    return f"{found['key']:<20}{found['bytes']:>8}  {reason} ({origin})"


_ROWS = {
    topics.BLOCKS: _block_row,
    topics.DECISIONS: _decision_row,
    topics.PODS: _pod_row,
    topics.WORKERS: _worker_row,
    topics.DLQ: _dlq_row,
}


def epoch(number: int) -> str:
    """Return an epoch as people read it: incarnation and clears."""
    return f"{number >> 32}.{number & 0xFFFFFFFF}"


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
    if record.topic == topics.BLOCKS:
        return _blocks(value)
    if record.topic == topics.PODS:
        return {"pod": msgspec.to_builtins(records.decode(records.PodRecord, value), str_keys=True)}
    if record.topic == topics.WORKERS and record.key == records.CATALOG_KEY:
        return {"catalog": msgspec.to_builtins(records.decode(records.IndexCatalog, value), str_keys=True)}
    if record.topic == topics.WORKERS:
        return {"worker": msgspec.to_builtins(records.decode(records.WorkerRecord, value), str_keys=True)}
    if record.topic == topics.DECISIONS:
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
