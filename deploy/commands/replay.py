"""``kvatlas replay``: read, filter, save or play back a topic."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge import records
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.commands.common import add_sections, load_sections
from kvatlas.deploy.history.capture import CaptureWriter, read_capture
from kvatlas.deploy.history.filters import Filter, Wanted, prefix_keys
from kvatlas.deploy.history.log import LogReader, Range, Record, find_sequence
from kvatlas.deploy.history.moment import FORMS, Moment, parse_moment
from kvatlas.deploy.history.playback import SCHEME, Playback
from kvatlas.deploy.history.show import EVENTS_HEAD, describe, event_rows
from kvatlas.deploy.history.summary import TYPES

HELP: Final = "read, filter, save or play back the event log"
_TOPICS: Final = (records.EVENTS, records.BLOCKS, records.DECISIONS, records.PODS, records.WORKERS, records.DLQ)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = f"MOMENT: {FORMS}."
    parser.add_argument("--topic", choices=_TOPICS, default=records.EVENTS, help="what to read (default kv-events)")
    parser.add_argument("--since", default="earliest", metavar="MOMENT", help="first record (default earliest)")
    parser.add_argument("--until", default="latest", metavar="MOMENT", help="end before this moment (default latest)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read a capture file instead of Kafka")
    parser.add_argument("--to", dest="target", metavar="FILE|zmq://...", help="save a capture, or play at a subscriber")
    parser.add_argument("--speed", type=float, default=1.0, help="of playback: 1 as recorded, 0 as fast as it goes")
    parser.add_argument("--pod", action="append", default=[], help="only this pod, repeatable")
    parser.add_argument("--model", action="append", default=[], help="only this model, repeatable")
    parser.add_argument("--type", action="append", default=[], choices=TYPES, help="only these events, repeatable")
    parser.add_argument("--key", action="append", default=[], metavar="HEX", help="only records that touch this block")
    parser.add_argument("--tokens", metavar="IDS", help="only records that touch a block of this token prefix: 1,2,3")
    parser.add_argument("--lora", help="adapter that --tokens is meant with")
    parser.add_argument("--cache-salt", help="cache salt that --tokens is meant with")
    parser.add_argument("--block-size-tokens", type=int, default=16, help="canonical block size (default 16)")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many records that match")
    parser.add_argument("--count", action="store_true", help="print counts alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a record")
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Read the range and show, save or play what matches; the counts go to standard error."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    counts = asyncio.run(_replay(args, kafka))
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "0 records"
    print(json.dumps(counts) if args.count and args.json else summary, file=sys.stdout if args.count else sys.stderr)
    return 0


def wanted(args: argparse.Namespace) -> Wanted:
    """Return the filter that the flags describe.

    Raises:
        SettingsError: a block key is not 32 hex digits, or a token list is no list of numbers.
    """
    keys: set[bytes] = set()
    for text in args.key:
        if len(text) != 32 or not all(digit in "0123456789abcdefABCDEF" for digit in text):
            raise SettingsError(f"--key {text!r}: a block key is 32 hex digits")
        keys.add(bytes.fromhex(text))
    if args.tokens:
        if not args.model:
            raise SettingsError("--tokens needs --model: block keys start from the model's name")
        try:
            tokens = [int(part) for part in args.tokens.split(",")]
        except ValueError as error:
            raise SettingsError(f"--tokens {args.tokens!r}: give token ids as 1,2,3") from error
        if len(tokens) < args.block_size_tokens:
            raise SettingsError(f"--tokens: {len(tokens)} tokens fill no block of {args.block_size_tokens}")
        for model in args.model:
            keys |= prefix_keys(tokens, model, args.lora, args.cache_salt, args.block_size_tokens)
    first, last = (_sequence(text) for text in (args.since, args.until))
    return Wanted(
        pods=frozenset(args.pod),
        models=frozenset(args.model),
        types=frozenset(args.type),
        keys=frozenset(keys),
        sequences=(first, last - 1 if last > 0 else -1),
    )


def _sequence(text: str) -> int:
    return int(text[4:]) if text.startswith("seq:") and text[4:].isdecimal() else -1


async def _replay(args: argparse.Namespace, kafka: KafkaSettings) -> Counter[str]:
    chosen = Filter(wanted(args), args.block_size_tokens)
    counts: Counter[str] = Counter()
    if args.source is not None:
        await _consume(args, chosen, _from_file(args.source, args.topic), counts, kafka.brokers)
        return counts
    async with LogReader(kafka) as reader:
        span = await _span(args, reader)
        # The order of time costs a merge of the partitions; a mere count is the same in any order.
        source = _unordered(reader, span) if args.count and not args.limit else reader.read_in_time(span)
        progress = _with_progress(source, span)
        await _consume(args, chosen, progress, counts, kafka.brokers)
    return counts


async def _unordered(reader: LogReader, span: Range) -> AsyncIterator[Record]:
    async for chunk in reader.read(span):
        for record in chunk:
            yield record


async def _span(args: argparse.Namespace, reader: LogReader) -> Range:
    now_ms = time.time_ns() // 1_000_000
    since, until = parse_moment(args.since, now_ms), parse_moment(args.until, now_ms)
    partitions = await reader.partitions(args.topic)
    only = None
    if args.pod and args.topic in (records.EVENTS, records.PODS):
        only = {records.pod_partition(pod, len(partitions)) for pod in args.pod}
    if since.sequence is None and until.sequence is None:
        return await reader.range(args.topic, since, until, only)
    if len(args.pod) != 1 or args.topic != records.EVENTS:
        raise SettingsError("a moment by sequence needs exactly one --pod and the topic kv-events")
    pod, partition = args.pod[0].encode(), records.pod_partition(args.pod[0], len(partitions))
    ends = []
    for moment in (since, until):
        if moment.sequence is None:
            ends.append(moment)
            continue
        at = await find_sequence(reader, args.topic, partition, _reaches(pod, moment.sequence))
        ends.append(Moment(offsets={partition: at}))
    return await reader.range(args.topic, ends[0], ends[1], only)


class _reaches:  # noqa: N801 - reads as a predicate where it is used
    """Matches a pod's first record at or past a sequence."""

    def __init__(self, pod: bytes, sequence: int) -> None:
        self._pod, self._sequence = pod, sequence

    def __call__(self, record: Record) -> bool:
        value = dict(record.headers).get(records.H_SEQUENCE, b"")
        return record.key == self._pod and value.isdigit() and int(value) >= self._sequence


async def _from_file(path: Path, topic: str) -> AsyncIterator[Record]:
    for record in read_capture(path):
        if record.topic == topic:
            yield record


async def _with_progress(source: AsyncIterator[Record], span: Range) -> AsyncIterator[Record]:
    """Pass records through; on a terminal, say how far it is."""
    live, total, done, shown = sys.stderr.isatty(), span.records, 0, time.monotonic()
    async for record in source:
        done += 1
        if live and done % 1000 == 0 and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{done}/{total} records of {span.topic}", end="\r", file=sys.stderr, flush=True)
        yield record


async def _consume(
    args: argparse.Namespace, chosen: Filter, source: AsyncIterator[Record], counts: Counter[str], brokers: str
) -> None:
    matching = _matching(args, chosen, source, counts)
    if args.target is None:
        await _print(args, matching)
    elif args.target.startswith(SCHEME):
        if args.topic != records.EVENTS:
            raise SettingsError(f"--to {args.target}: only kv-events can be played at a subscriber")
        with Playback(args.target, args.speed) as playback:
            print(f"playing at {playback.endpoint}", file=sys.stderr, flush=True)
            await playback.wait_for_subscriber()
            counts["played"] = await playback.send(_records(matching))
    else:
        with CaptureWriter(Path(args.target), time.time_ns(), brokers) as writer:
            async for record, _ in matching:
                writer.write(record)
        counts["saved"] = writer.records


Match = tuple[Record, list[str] | None]


async def _records(matching: AsyncIterator[Match]) -> AsyncIterator[Record]:
    async for record, _ in matching:
        yield record


async def _matching(
    args: argparse.Namespace, chosen: Filter, source: AsyncIterator[Record], counts: Counter[str]
) -> AsyncIterator[Match]:
    """Yield the records that match, with their rows when they are going to be printed."""
    printing = args.target is None and not args.count
    async for record in source:
        counts["read"] += 1
        rows: list[str] | None = None
        if record.topic == records.EVENTS:
            message = chosen.message(record)
            if message is None:
                continue
            counts.update(chosen.types(message))
            if printing:
                line = chosen.line(message)
                rows = [msgspec.json.encode(line).decode()] if args.json else event_rows(line)
        else:
            if not _other(chosen, record):
                continue
            if printing:
                rows = [json.dumps(describe(record))]
        counts["matched"] += 1
        yield record, rows
        if args.limit and counts["matched"] >= args.limit:
            return


def _other(chosen: Filter, record: Record) -> bool:
    if record.topic == records.BLOCKS:
        return chosen.blocks(record)
    if record.topic == records.DECISIONS:
        return chosen.decision(record)
    return True


async def _print(args: argparse.Namespace, matching: AsyncIterator[Match]) -> None:
    head = args.topic == records.EVENTS and not args.json and not args.count
    if head:
        print(EVENTS_HEAD)
    async for _, rows in matching:
        if rows:
            print("\n".join(rows))
