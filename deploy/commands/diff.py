"""``kvatlas diff``: what changed per pod between two moments."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli.common import add_sections, load_sections
from kvatlas.deploy.commands.at import (
    add_rebuild_arguments,
    check_snapshots,
    note_beginning,
    options_of,
    progress_to_stderr,
)
from kvatlas.deploy.history.log import LogReader, Range
from kvatlas.deploy.history.moment import EARLIEST, FORMS, Moment, parse_moment
from kvatlas.deploy.history.rebuild import PastIndex, advance, differences, rebuild
from kvatlas.streams.index.apply import is_meta, live_holders
from kvatlas.streams.index.holders import HOLDER_BYTES, IDENTITY_BYTES, POD_BYTES

HELP: Final = "what changed per pod between two moments"


class PodChange(msgspec.Struct, kw_only=True):
    """How one pod differs between two moments; blocks count once per tier and group."""

    pod: str
    added: int = 0
    removed: int = 0
    messages: int = 0
    lost: int = 0
    epoch_raised: bool = False
    state: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = f"MOMENT: {FORMS}. The later moment must not come first."
    parser.add_argument("first", metavar="MOMENT1", help="from when")
    parser.add_argument("second", metavar="MOMENT2", help="to when")
    parser.add_argument("--json", action="store_true", help="one JSON object a pod")
    add_rebuild_arguments(parser)
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Rebuild both states and print one row for each pod that is in either."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    check_snapshots(args.snapshots)
    with tempfile.TemporaryDirectory(prefix="kvatlas-diff-") as folder:
        before, after = asyncio.run(_both(args, kafka, Path(folder)))
        changes = compare(before, after)
        before.close(keep=False)
        after.close(keep=False)
    if not args.json:
        print(f"{'pod':<24}{'added':>10}{'removed':>10}{'messages':>10}{'lost':>6}  epoch")
    for change in changes:
        if args.json:
            print(msgspec.json.encode(change).decode())
        else:
            epoch = "raised" if change.epoch_raised else "same"
            print(
                f"{change.pod:<24}{change.added:>10}{change.removed:>10}{change.messages:>10}{change.lost:>6}"
                f"  {epoch} {change.state}"
            )
    return 0


async def _both(args: argparse.Namespace, kafka: KafkaSettings, folder: Path) -> tuple[PastIndex, PastIndex]:
    now_ms = time.time_ns() // 1_000_000
    options = options_of(args)
    first, second = (parse_moment(text, now_ms) for text in (args.first, args.second))
    async with LogReader(kafka) as reader:
        await _check_order(reader, args, first, second)
        before = await rebuild(
            reader,
            kafka,
            first,
            folder=folder / "first",
            options=options,
            clock=time.time_ns,
            snapshots=args.snapshots,
            progress=progress_to_stderr("first moment"),
        )
        note_beginning(before)
        offsets, names = before.offsets, set(before.pods())
        before.close()
        await asyncio.to_thread(shutil.copytree, folder / "first", folder / "second")
        after = PastIndex(folder / "second", options, time.time_ns)
        after.resume(offsets, names)
        ends = await reader.range(topics.EVENTS, first, second)
        bounds = {part: (offsets.get(part, start), end) for part, (start, end) in ends.bounds.items()}
        span = Range(topics.EVENTS, {part: (start, max(start, end)) for part, (start, end) in bounds.items()})
        await advance(reader, after, span, progress_to_stderr("second moment"))
    before = PastIndex(folder / "first", options, time.time_ns)
    before.resume(offsets, names)
    return before, after


async def _check_order(reader: LogReader, args: argparse.Namespace, first: Moment, second: Moment) -> None:
    """See that the second moment is not before the first.

    Raises:
        SettingsError: it is, in some partition.
    """
    ends = [(await reader.range(topics.EVENTS, EARLIEST, moment)).bounds for moment in (first, second)]
    if any(ends[1][partition][1] < end for partition, (_, end) in ends[0].items()):
        raise SettingsError(f"{args.second} is before {args.first}; give the earlier moment first")


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
