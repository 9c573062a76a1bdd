"""``kvatlas bench resolve``: the pure parts of the worker alone, in one core, over plain dicts."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.adapters.vllm import decode
from kvatlas.bridge.model.events import Limits
from kvatlas.deploy.bench._figures import figure, removed, stored
from kvatlas.streams.index.apply import apply_blocks
from kvatlas.streams.index.blocks_record import BlocksRecord, decode_blocks
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver

HELP: Final = "decode, resolve and index alone: blocks/s and updates/s of one core, without Kafka and RocksDB"

_PARTITIONS: Final = 8
_EVENTS: Final = 4
_BLOCKS: Final = 8
_FLUSH: Final = 64
_PODS: Final = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--messages", type=int, default=4_000, help="messages of 32 blocks")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case; the best counts")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    plain = _payloads(args.messages, 16)
    blocks = args.messages * _EVENTS * _BLOCKS
    yield _figure("decode", _best(args, lambda: _decode(plain)), blocks, "blocks/s")
    yield _figure("decode+resolve", _best(args, lambda: _resolve(plain)), blocks, "blocks/s")
    small = _payloads(args.messages, 8)
    yield _figure("decode+resolve, E=8 C=16", _best(args, lambda: _resolve(small)), blocks, "blocks/s")
    large = _payloads(args.messages // 2, 32)
    yield _figure("decode+resolve, E=32 C=16", _best(args, lambda: _resolve(large)), blocks // 2, "blocks/s")
    both = _payloads(args.messages, 16, removals=True)
    yield _figure("decode+resolve, stored and removed", _best(args, lambda: _resolve(both)), 2 * blocks, "blocks/s")
    yield from _index(args, plain, blocks)
    yield _answers(args)


def _figure(case: str, seconds: float, count: int, unit: str) -> dict[str, Any]:
    return figure(case, count / seconds, unit)


def _best(args: argparse.Namespace, work: Callable[[], object]) -> float:
    """Return the shortest of a few runs, in seconds of the process (other processes share the machine)."""
    times = []
    for _ in range(args.repeat):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def _payloads(count: int, size: int, *, removals: bool = False) -> list[bytes]:
    """Return messages of 4 stored events of 8 blocks each, all new; with removals each goes again in the next."""
    chance = random.Random(7)  # noqa: S311 # the same load every time
    made = []
    last: list[Any] = []
    spec = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    for _ in range(count):
        events: list[Any] = []
        for _ in range(_EVENTS):
            hashes = [chance.getrandbits(64) for _ in range(_BLOCKS)]
            tokens = [chance.randrange(150_000) for _ in range(_BLOCKS * size)]
            events.append(stored(hashes, tokens, size=size) | spec)
        made.append(encode_batch(1.0, last + events if removals else events, 0))
        last = [removed(event["block_hashes"]) for event in events]
    if removals:
        made.append(encode_batch(1.0, last, 0))
    return made


def _decode(payloads: list[bytes]) -> None:
    limits = Limits()
    for payload in payloads:
        decode(payload, limits)


def _resolve(payloads: list[bytes]) -> list[tuple[int, bytes]]:
    """Resolve messages of a few pods in flushes; returns the ``kv-blocks`` records."""
    resolver = Resolver(ResolveOptions(), _PARTITIONS, time.time_ns)
    view = DictView()
    made: list[tuple[int, bytes]] = []
    for start in range(0, len(payloads), _FLUSH):
        effects = Effects(_PARTITIONS)
        part = resolver.slice(view, effects)
        for number in range(start, min(start + _FLUSH, len(payloads))):
            pod, sequence = f"pod-{number % _PODS}", number // _PODS
            message = Message(pod=pod, value=payloads[number], sequence=sequence, incarnation=1, model="demo")
            for _ in resolver.steps(part, message):
                pass
        part.finish()
        made += ((partition, value) for partition, values in effects.encode().items() for value in values)
    return made


def _index(args: argparse.Namespace, payloads: list[bytes], blocks: int) -> Iterator[dict[str, Any]]:
    values = _resolve(payloads)
    yield _figure(
        "decode kv-blocks", _best(args, lambda: [decode_blocks(value) for _, value in values]), blocks, "updates/s"
    )
    decoded = [(partition, decode_blocks(value)) for partition, value in values]
    yield _figure(
        "index", _best(args, lambda: _apply(decoded, [DictView() for _ in range(_PARTITIONS)])), blocks, "updates/s"
    )
    others = [(partition, _by_another(record)) for partition, record in decoded]

    def second() -> float:
        views = [DictView() for _ in range(_PARTITIONS)]
        _apply(decoded, views)
        began = time.process_time()
        _apply(others, views)
        return time.process_time() - began

    yield _figure("index, second holder", min(second() for _ in range(args.repeat)), blocks, "updates/s")


def _apply(decoded: list[tuple[int, BlocksRecord]], views: list[DictView]) -> None:
    counts: Counter[str] = Counter()
    for partition, record in decoded:
        apply_blocks(views[partition], record, counts)


def _by_another(record: BlocksRecord) -> BlocksRecord:
    """Return the same updates by other pods."""
    runs = tuple(found._replace(pod_ref=found.pod_ref ^ 1) for found in record.runs)
    holders = bytearray(record.holders)
    for at in range(7, len(holders), 24):
        holders[at] ^= 1
    return record._replace(runs=runs, holders=bytes(holders))


def _answers(args: argparse.Namespace) -> dict[str, Any]:
    """Build the answers to lookups of 512 keys whose holders change every 32 keys."""
    values: list[bytes | None] = [bytes([number // 32]) * 72 for number in range(512)]
    rounds = 500
    seconds = _best(args, lambda: [answer_columns(values) for _ in range(rounds)])
    return _figure("lookup answer", seconds, rounds * len(values), "keys/s")
