"""What changed per pod between two moments: both states rebuilt from the log, and compared block by block."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader, Range
from kvatlas.deploy.history.moment import EARLIEST, Moment
from kvatlas.deploy.history.rebuild import PastIndex, advance, differences, rebuild
from kvatlas.streams.index.apply import is_meta, live_holders
from kvatlas.streams.index.holders import HOLDER_BYTES, IDENTITY_BYTES, POD_BYTES
from kvatlas.streams.resolve.resolver import ResolveOptions

Progress = Callable[[int, int], None] | None


class PodChange(msgspec.Struct, kw_only=True):
    """How one pod differs between two moments; blocks count once per tier and group."""

    pod: str
    added: int = 0
    removed: int = 0
    messages: int = 0
    lost: int = 0
    epoch_raised: bool = False
    state: str = ""


async def changes_between(
    reader: LogReader,
    kafka: KafkaSettings,
    first: Moment,
    second: Moment,
    *,
    folder: Path,
    options: ResolveOptions,
    snapshots: Path | None = None,
    began: Callable[[PastIndex], None] = lambda _past: None,
    progress: tuple[Progress, Progress] = (None, None),
) -> list[PodChange]:
    """Rebuild both states and return the changes of every pod that is in either, by name.

    Args:
        reader: an open reader.
        kafka: which log.
        first: from when.
        second: to when.
        folder: a scratch folder.
        options: what the deployment decides about the meaning of events.
        snapshots: where saved states are; None folds from the start of the log.
        began: told the first state once it is there.
        progress: called with records done and to do, of the first and the second state.

    Raises:
        SettingsError: the second moment is before the first.
        LogError: the log does not answer.
    """
    await _check_order(reader, first, second)
    before = await rebuild(
        reader,
        kafka,
        first,
        folder=folder / "first",
        options=options,
        clock=time.time_ns,
        snapshots=snapshots,
        progress=progress[0],
    )
    began(before)
    offsets, names = before.offsets, set(before.pods())
    before.close()
    await asyncio.to_thread(shutil.copytree, folder / "first", folder / "second")
    after = PastIndex(folder / "second", options, time.time_ns)
    after.resume(offsets, names)
    ends = await reader.range(topics.EVENTS, first, second)
    bounds = {part: (offsets.get(part, start), end) for part, (start, end) in ends.bounds.items()}
    span = Range(topics.EVENTS, {part: (start, max(start, end)) for part, (start, end) in bounds.items()})
    await advance(reader, after, span, progress[1])
    before = PastIndex(folder / "first", options, time.time_ns)
    before.resume(offsets, names)
    try:
        return compare(before, after)
    finally:
        before.close(keep=False)
        after.close(keep=False)


async def _check_order(reader: LogReader, first: Moment, second: Moment) -> None:
    """See that the second moment is not before the first.

    Raises:
        SettingsError: it is, in some partition.
    """
    ends = [(await reader.range(topics.EVENTS, EARLIEST, moment)).bounds for moment in (first, second)]
    if any(ends[1][partition][1] < end for partition, (_, end) in ends[0].items()):
        raise SettingsError("the second moment is before the first; give the earlier moment first")


def compare(before: PastIndex, after: PastIndex) -> list[PodChange]:
    """Return the changes of every pod that is in either state, by name."""
    old, new = before.pods(), after.pods()
    changes = {name: PodChange(pod=name) for name in sorted({*old, *new})}
    by_ref = {pod_ids.pod_ref(name).to_bytes(POD_BYTES, "big"): changes[name] for name in changes}
    for key, was, now in differences(_entries(before, old), _entries(after, new)):
        if is_meta(key):
            continue
        held, holds = _identities(was), _identities(now)
        for identity in holds - held:
            _bump(by_ref, identity, "added")
        for identity in held - holds:
            _bump(by_ref, identity, "removed")
    for name, change in changes.items():
        first, last = old.get(name), new.get(name)
        if last is not None:
            change.state = last.state
            change.lost = last.lost - (first.lost if first else 0)
            change.epoch_raised = first is not None and last.epoch > first.epoch
            same_stream = first is not None and not change.epoch_raised
            change.messages = last.last_sequence - (first.last_sequence if first and same_stream else -1)
    return list(changes.values())


def _entries(past: PastIndex, pods: Mapping[str, records.PodRecord]) -> Iterator[tuple[bytes, bytes]]:
    valid = {pod_ids.pod_ref(name): record.validity for name, record in pods.items()}
    for key, value in past.blocks.items():
        yield key, value if is_meta(key) else live_holders(value, valid)


def _identities(value: bytes) -> set[bytes]:
    return {value[at : at + IDENTITY_BYTES] for at in range(0, len(value), HOLDER_BYTES)}


def _bump(by_ref: dict[bytes, PodChange], identity: bytes, field: str) -> None:
    change = by_ref.get(identity[:POD_BYTES])
    if change is not None:
        setattr(change, field, getattr(change, field) + 1)
