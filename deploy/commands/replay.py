"""``kvatlas replay``: read, filter, save or play back a topic."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli.common import add_sections, at_least, file_error, load_sections, token_ids
from kvatlas.deploy.history.capture import CaptureWriter, capture_topic, read_capture
from kvatlas.deploy.history.filters import FILTERS, Filter, Wanted, prefix_keys
from kvatlas.deploy.history.log import LogReader, Range, Record
from kvatlas.deploy.history.moment import FORMS, SEQUENCE_FORM, parse_moment
from kvatlas.deploy.history.playback import SCHEME, Playback
from kvatlas.deploy.history.show import HEADS, describe, event_rows, row
from kvatlas.deploy.history.summary import TYPES
from kvatlas.deploy.history.window import Window, range_of

_TOPICS: Final = (topics.EVENTS, topics.BLOCKS, topics.DECISIONS, topics.PODS, topics.WORKERS, topics.DLQ)
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = f"MOMENT: {FORMS}, or {SEQUENCE_FORM}."
    parser.add_argument(
        "--topic", choices=_TOPICS, help="what to read (default kv-events; of a capture: the topic it begins with)"
    )
    parser.add_argument("--since", default="earliest", metavar="MOMENT", help="first record (default earliest)")
    parser.add_argument("--until", default="latest", metavar="MOMENT", help="end before this moment (default latest)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read a capture file instead of Kafka")
    parser.add_argument("--to", dest="target", metavar="FILE|zmq://...", help="save a capture, or play at a subscriber")
    parser.add_argument(
        "--speed", type=at_least(0, float), default=1.0, help="of playback: 1 as recorded, 0 as fast as it goes"
    )
    parser.add_argument("--pod", action="append", default=[], help="only this pod, repeatable")
    parser.add_argument("--model", action="append", default=[], help="only this model, repeatable")
    parser.add_argument("--type", action="append", default=[], choices=TYPES, help="only these events, repeatable")
    parser.add_argument("--key", action="append", default=[], metavar="HEX", help="only records that touch this block")
    parser.add_argument("--tokens", metavar="IDS", help="only records that touch a block of this token prefix: 1,2,3")
    parser.add_argument("--lora", help="adapter that --tokens is meant with")
    parser.add_argument("--cache-salt", help="cache salt that --tokens is meant with")
    parser.add_argument("--block-size-tokens", type=at_least(1), default=16, help="canonical block size (default 16)")
    parser.add_argument("--limit", type=at_least(0), default=0, help="stop after so many records that match")
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
        tokens = token_ids(args.tokens)
        if len(tokens) < args.block_size_tokens:
            raise SettingsError(f"--tokens: {len(tokens)} tokens fill no block of {args.block_size_tokens}")
        for model in args.model:
            keys |= prefix_keys(tokens, model, args.lora, args.cache_salt, args.block_size_tokens)
    return Wanted(
        pods=frozenset(args.pod), models=frozenset(args.model), types=frozenset(args.type), keys=frozenset(keys)
    )


def _check_filters(args: argparse.Namespace, topic: str) -> None:
    """See that no filter is given that the topic's records cannot be asked for.

    Raises:
        SettingsError: one is.
    """
    known = FILTERS[topic] | ({"model"} if args.tokens else set())
    for name in ("pod", "model", "type", "key", "tokens"):
        if getattr(args, name) and name not in known:
            there = ", ".join(f"--{one}" for one in sorted(FILTERS[topic])) or "none"
            raise SettingsError(f"--{name} is no filter of {topic}; there are: {there}")


async def _replay(args: argparse.Namespace, kafka: KafkaSettings) -> Counter[str]:
    now_ms = time.time_ns() // 1_000_000
    since, until = (parse_moment(text, now_ms, sequences=True) for text in (args.since, args.until))
    chosen = Filter(wanted(args), args.block_size_tokens)
    counts: Counter[str] = Counter()
    topic = args.topic or (topics.EVENTS if args.source is None else capture_topic(args.source))
    _check_filters(args, topic)
    if args.source is not None:
        source = _from_file(args.source, topic, Window(topic, since, until, args.pod))
        await _consume(args, topic, _matching(args, chosen, source, counts), counts, kafka.brokers)
        return counts
    async with LogReader(kafka) as reader:
        only = None
        if args.pod and topic in (topics.EVENTS, topics.PODS):
            count = len(await reader.partitions(topic))
            only = {pod_ids.pod_partition(pod, count) for pod in args.pod}
        span = await range_of(reader, topic, since, until, pods=args.pod, only=only)
        # The order of time costs a merge of the partitions; a mere count is the same in any order.
        source = _unordered(reader, span) if args.count and not args.limit else reader.read_in_time(span)
        matching = _matching(args, chosen, _with_progress(source, span), counts)
        await _consume(args, topic, matching, counts, kafka.brokers)
    return counts


async def _unordered(reader: LogReader, span: Range) -> AsyncIterator[Record]:
    async for chunk in reader.read(span):
        for record in chunk:
            yield record


async def _from_file(path: Path, topic: str, window: Window) -> AsyncIterator[Record]:
    """Yield the records of a topic in a capture that lie in a window.

    Raises:
        SettingsError: the capture has records, and none of the topic.
    """
    others: set[str] = set()
    found = False
    for record in read_capture(path):
        if record.topic != topic:
            others.add(record.topic)
            continue
        found = True
        if window.holds(record):
            yield record
    if others and not found:
        raise SettingsError(f"{path} holds no records of {topic}; give --topic {' or '.join(sorted(others))}")


async def _with_progress(source: AsyncIterator[Record], span: Range) -> AsyncIterator[Record]:
    """Pass records through; on a terminal, say how far it is."""
    live, total, done, shown = sys.stderr.isatty(), span.records, 0, time.monotonic()
    async for record in source:
        done += 1
        if live and done % 1000 == 0 and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{done}/{total} records of {span.topic}", end="\r", file=sys.stderr, flush=True)
        yield record


Match = tuple[Record, list[str] | None]


async def _consume(
    args: argparse.Namespace, topic: str, matching: AsyncIterator[Match], counts: Counter[str], brokers: str
) -> None:
    if args.target is None:
        await _print(args, topic, matching)
    elif args.target.startswith(SCHEME):
        if topic != topics.EVENTS:
            raise SettingsError(f"--to {args.target}: only kv-events can be played at a subscriber")
        with Playback(args.target, args.speed) as playback:
            print(f"playing at {playback.endpoint}", file=sys.stderr, flush=True)
            await playback.wait_for_subscriber()
            counts["played"] = await playback.send(_records(matching))
    else:
        counts["saved"] = await _save(Path(args.target), matching, brokers)


async def _save(path: Path, matching: AsyncIterator[Match], brokers: str) -> int:
    """Write a capture; returns how many records it holds.

    Raises:
        SettingsError: the file cannot be written.
    """
    if not path.name:
        raise SettingsError(f"--to {str(path)!r} names no file")
    try:
        writer = CaptureWriter(path, time.time_ns(), brokers)
    except OSError as error:
        raise file_error("--to", path, error) from error
    try:
        with writer:
            async for record, _ in matching:
                writer.write(record)
    except OSError as error:
        if error.errno not in _NO_ROOM:  # of Kafka's connection, not of the file
            raise
        raise file_error("--to", path, error) from error
    return writer.records


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
        if record.topic == topics.EVENTS:
            message = chosen.message(record)
            if message is None:
                continue
            counts.update(chosen.types(message))
            if printing:
                line = chosen.line(message)
                rows = [msgspec.json.encode(line).decode()] if args.json else event_rows(line)
        else:
            if not chosen.other(record):
                continue
            if printing:
                rows = [json.dumps(describe(record)) if args.json else row(record)]
        counts["matched"] += 1
        yield record, rows
        if args.limit and counts["matched"] >= args.limit:
            return


async def _print(args: argparse.Namespace, topic: str, matching: AsyncIterator[Match]) -> None:
    head = not args.json and not args.count
    async for _, rows in matching:
        if head:
            print(HEADS[topic])
            head = False
        if rows:
            print("\n".join(rows))
