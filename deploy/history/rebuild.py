"""The index as of a past moment: the log folded again, by the same pure functions that the workers run.

A state is two scratch tables and the pods' records, and stands between two records of ``kv-events`` in every
partition. It can be saved as a snapshot, a folder, and a later rebuild goes on from the nearest one::

    <snapshots>/<name>/snapshot.json      which log, which offsets, what events meant
    <snapshots>/<name>/engine_blocks.db   RocksDB
    <snapshots>/<name>/block_index.db     RocksDB
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, LogError, WireError
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader, Range, Record
from kvatlas.deploy.history.moment import Moment
from kvatlas.streams.resolve.engine_blocks import decode_state, state_key
from kvatlas.streams.resolve.fold import LogFold
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, pod_record
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.local_table import LocalTable

_META: Final = "snapshot.json"
_ENGINE_BLOCKS: Final = "engine_blocks.db"
_BLOCK_INDEX: Final = "block_index.db"
_VERSION: Final = 2
_CACHE_BYTES: Final = 256 * 1024 * 1024


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved state reflects.

    Attributes:
        brokers, topic: the log it was folded from.
        options: what events meant when it was folded: canonical block size, announcements, gaps, clears.
        offsets: ``kv-events`` partition -> offset after the last record in it.
        pods: pod ids in it.
        created_ns: wall clock, ns since the epoch.
    """

    v: int = _VERSION
    brokers: str
    topic: str
    options: dict[str, Any]
    offsets: dict[int, int]
    pods: list[str]
    created_ns: int


class PastIndex:
    """The index while it is folded, and after.

    Args:
        folder: an empty folder, or a copy of a snapshot.
        options: what the deployment decides about the meaning of events.
        clock: wall clock, ns since the epoch, for the pods' records.

    Attributes:
        offsets: ``kv-events`` partition -> offset after the last record in it.
        begins: partition -> first record on the log, where records between the state's beginning and that are gone.
    """

    def __init__(self, folder: Path, options: ResolveOptions, clock: Callable[[], int]) -> None:
        budget = RocksBudget(_CACHE_BYTES, _CACHE_BYTES)
        self.folder = folder
        self.options = options
        self.blocks = LocalTable(folder / _BLOCK_INDEX, budget)
        self.engine_blocks = LocalTable(folder / _ENGINE_BLOCKS, budget)
        self.offsets: dict[int, int] = {}
        self.begins: dict[int, int] = {}
        self._names: set[str] = set()
        self._clock = clock
        self._fold = LogFold(options, self.engine_blocks, self.blocks, clock)
        self.counts = self._fold.counts

    def resume(self, offsets: Mapping[int, int], pods: Iterable[str]) -> None:
        """Say what the tables that are in the folder already reflect."""
        self.offsets = dict(offsets)
        self._names = set(pods)

    def apply(self, chunk: Sequence[Record]) -> None:
        """Fold the next records of one ``kv-events`` partition."""
        messages = [parse_message(one.key, one.value, one.headers, one.partition, one.offset) for one in chunk]
        self._names.update(message.pod for message in messages)
        self._fold.apply(messages)
        self.offsets[chunk[-1].partition] = chunk[-1].offset + 1
        self.blocks.settle()
        self.engine_blocks.settle()

    def pods(self) -> dict[str, records.PodRecord]:
        """Return the pods' records as they were, by pod id."""
        found = {}
        for name in sorted(self._names):
            value = self.engine_blocks.get(state_key(pod_ids.pod_ref(name).to_bytes(8, "big")))
            if value is not None:
                found[name] = pod_record(decode_state(value), self._clock())
        return found

    def save(self, folder: Path, brokers: str, topic: str) -> Snapshot:
        """Close the tables and move them under ``folder`` as a snapshot."""
        pods = sorted(self._names)
        self.close()
        snapshot = Snapshot(
            brokers=brokers,
            topic=topic,
            options=_meaning(self.options),
            offsets=self.offsets,
            pods=pods,
            created_ns=self._clock(),
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder, folder)
        # Last, so that a folder without it is no snapshot.
        (folder / _META).write_bytes(msgspec.json.encode(snapshot))
        return snapshot

    def close(self, *, keep: bool = True) -> None:
        """Let go of the folder, with everything written to it unless it is not to be kept."""
        self.blocks.close(keep=keep)
        self.engine_blocks.close(keep=keep)


def _meaning(options: ResolveOptions) -> dict[str, Any]:
    """Return options as a snapshot keeps them."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(options))
    return plain


def nearest(folder: Path, brokers: str, topic: str, options: ResolveOptions, ends: dict[int, int]) -> Path | None:
    """Return the snapshot of this log, folded with these options, that is furthest along without passing ``ends``."""
    meaning = _meaning(options)
    best: tuple[int, Path] | None = None
    for meta in sorted(folder.glob(f"*/{_META}")):
        snapshot = load_snapshot(meta.parent)
        same = (snapshot.brokers, snapshot.topic, snapshot.options) == (brokers, topic, meaning)
        if not same or any(offset > ends.get(partition, 0) for partition, offset in snapshot.offsets.items()):
            continue
        reach = sum(snapshot.offsets.values())
        if best is None or reach > best[0]:
            best = (reach, meta.parent)
    return best[1] if best else None


def load_snapshot(folder: Path) -> Snapshot:
    """Read what a snapshot says of itself.

    Raises:
        WireError: the file is damaged or of another version.
    """
    path = folder / _META
    try:
        snapshot = msgspec.json.decode(path.read_bytes(), type=Snapshot)
    except (OSError, *DECODE_ERRORS) as error:
        raise WireError(f"{path}: not a snapshot: {error}; remove the folder") from error
    if snapshot.v != _VERSION:
        raise WireError(f"{path}: snapshot of version {snapshot.v}; this build reads {_VERSION}")
    return snapshot


async def rebuild(
    reader: LogReader,
    kafka: KafkaSettings,
    until: Moment,
    *,
    folder: Path,
    options: ResolveOptions,
    clock: Callable[[], int],
    snapshots: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PastIndex:
    """Fold the log up to a moment.

    Args:
        reader: an open reader.
        kafka: which log, to tell snapshots of different logs apart.
        until: state before the record at this moment.
        folder: an empty scratch folder.
        options: what the deployment decides about the meaning of events.
        clock: wall clock, ns since the epoch.
        snapshots: where saved states are; None folds from the start of the log.
        progress: called with records done and to do.

    Raises:
        LogError: the log does not answer.
    """
    whole = await reader.range(topics.EVENTS, Moment(edge="earliest"), until)
    ends = {partition: end for partition, (_, end) in whole.bounds.items()}
    base = nearest(snapshots, kafka.brokers, kafka.topic(topics.EVENTS), options, ends) if snapshots else None
    starts: dict[int, int] = {}
    if base is not None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        starts = dict(load_snapshot(base).offsets)
    past = PastIndex(folder, options, clock)
    if base is not None:
        past.resume(starts, load_snapshot(base).pods)
    past.begins = {part: first for part, (first, _) in whole.bounds.items() if first > starts.get(part, 0)}
    bounds = {part: (max(first, starts.get(part, first)), end) for part, (first, end) in whole.bounds.items()}
    await advance(reader, past, Range(topics.EVENTS, bounds), progress)
    return past


async def advance(
    reader: LogReader, past: PastIndex, span: Range, progress: Callable[[int, int], None] | None = None
) -> None:
    """Fold a further range of ``kv-events`` into a state.

    Raises:
        LogError: the range leaves out records after what the state reflects, or the log does not answer.
    """
    for partition, (start, end) in span.bounds.items():
        reached = past.offsets.get(partition)
        if reached is not None and start > reached and start < end:
            raise LogError(
                f"kv-events/{partition}: records {reached} to {start - 1} are no longer on the log, and the "
                "snapshot ends before them; leave out --snapshots, or keep later ones"
            )
    done = 0
    async for chunk in reader.read(span):
        past.apply(chunk)
        done += len(chunk)
        if progress:
            progress(done, span.records)
    for partition, (_, end) in span.bounds.items():
        past.offsets[partition] = max(end, past.offsets.get(partition, 0))


def differences(
    before: Iterator[tuple[bytes, bytes]], after: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (block key, value before, value after) where two tables differ, walking both in key order."""
    old, new = next(before, None), next(after, None)
    while old is not None or new is not None:
        if new is None or (old is not None and old[0] < new[0]):
            assert old is not None
            yield old[0], old[1], b""
            old = next(before, None)
        elif old is None or new[0] < old[0]:
            yield new[0], b"", new[1]
            new = next(after, None)
        else:
            if old[1] != new[1]:
                yield old[0], old[1], new[1]
            old, new = next(before, None), next(after, None)
