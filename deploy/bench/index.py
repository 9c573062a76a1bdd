"""``kvatlas bench index``: how fast block updates go into the table, and engine messages through both agents."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import faust
from faust.types import TP

from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import figure, headers, stored
from kvatlas.streams.index.blocks_record import OP_ADD, decode_blocks
from kvatlas.streams.index.holders import HOLDER_BYTES, add_holder, remove_holder

HELP: Final = "block updates/s into the index (beside a stock faust.Table), and blocks/s through resolve and index"

_UPDATES: Final = 2_000_000
_BLOCKS: Final = 1_000_000
_PODS: Final = 3
_BASELINE_UPDATES: Final = 100_000
_BASELINE_SECONDS: Final = 20.0
_ENGINE_BLOCKS: Final = 600_000
_BLOCKS_PER_MESSAGE: Final = 64
_ENGINES: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)
    parser.add_argument("--case", choices=["all", "index", "resolve+index"], default="all")
    parser.add_argument("--no-baseline", action="store_true", help="leave the stock table out")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    with _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder):
        if args.case in ("all", "index"):
            stock, batched = 0.0, 0.0
            if not args.no_baseline:
                stock = asyncio.run(_baseline(bootstrap, folder / "stock", args, updates_per_record=1))
                batched = asyncio.run(_baseline(bootstrap, folder / "batched", args))
            rate, memory = asyncio.run(_index(bootstrap, folder / "index", args))
            yield figure("index", rate, "updates/s", **({"baseline": stock, "ratio": rate / stock} if stock else {}))
            if batched:
                case = "index beside stock on our batches"
                yield figure(case, rate, "updates/s", baseline=batched, ratio=rate / batched)
            for case, value in memory.items():
                yield figure(case, value, "bytes")
        if args.case in ("all", "resolve+index"):
            rate, cpu = asyncio.run(_resolve_index(bootstrap, folder / "both", args))
            yield figure("resolve+index", rate, "blocks/s", cpu_us_per_block=cpu * 1e6)


async def _index(bootstrap: str, folder: Path, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    kafka = await _rig.fresh_topics(bootstrap, args.partitions)
    topic = kafka.topic(topics.BLOCKS)
    load = _rig.Load(_PODS, args.partitions)
    keys = load.keys(int(_BLOCKS * args.scale))
    start = _rig.applied("index")
    async with _rig.producer(kafka) as target:
        for pod in range(_PODS):
            await _rig.send(target, topic, load.records(keys, pod))
        async with _rig.worker(kafka, folder, role="index"):
            filled = start + _PODS * len(keys)
            await _rig.until_applied("index", filled)
        made = load.churn(keys, int(_UPDATES * args.scale))
        updates = _rig.count_updates(made)
        await _rig.send(target, topic, made)
    async with _rig.worker(kafka, folder, role="index") as service:
        while _rig.applied("index") == filled:  # noqa: ASYNC110 # a counter tells nobody
            await asyncio.sleep(0.002)
        first, began = _rig.applied("index"), time.monotonic()
        ended = await _rig.until_applied("index", filled + updates)
        table = service.index_table()
        states = list(table.states.values())
        for state in states:
            state._db.raw.flush()
            state._db.raw.compact_range(None, None)
        entries = sum(len(value) // HOLDER_BYTES for state in states for _, value in state.items())
        disk = sum(state.size_bytes() for state in states)
        cached = sum(
            len(value) // HOLDER_BYTES
            for state in states
            for generation in (state.cache.young, state.cache.old)
            for value in generation.values()
        )
        memory = {
            "disk bytes per (block, pod)": disk / max(entries, 1),
            "cache bytes per (block, pod)": sum(state.cache.size_bytes for state in states) / max(cached, 1),
        }
    return (filled + updates - first) / (ended - began), memory


async def _baseline(
    bootstrap: str, folder: Path, args: argparse.Namespace, updates_per_record: int = _rig.UPDATES_PER_RECORD
) -> float:
    """Measure stock Faust: the same updates into a table of the same size, one ``faust.Table`` assignment each.

    With one update a record it is what Faust's users write; with our records it lacks our table alone.
    """
    kafka = await _rig.fresh_topics(bootstrap, args.partitions, app="stock")
    keys = _rig.Load(_PODS, args.partitions).keys(int(_BLOCKS * args.scale))
    whole = _rig.Load(_PODS, args.partitions)
    filled = [record for pod in range(_PODS) for record in whole.records(keys, pod)]
    load = _rig.Load(_PODS, args.partitions, seed=8, updates_per_record=updates_per_record)
    made = load.churn(keys, _BASELINE_UPDATES)
    async with _rig.producer(kafka) as target:
        await _rig.send(target, kafka.topic(topics.BLOCKS), made)
    expected = _rig.count_updates(made)
    app = _stock_app(kafka, folder)
    table = app.Table("block_index", key_type=bytes, value_type=bytes)
    topic = app.topic(kafka.topic(topics.BLOCKS), value_type=bytes, value_serializer="raw")
    progress = {"updates": 0, "began": 0.0}

    async def apply(stream: Any) -> None:
        async for value in stream:
            progress["began"] = progress["began"] or time.monotonic()
            record = decode_blocks(value)
            for number, op in enumerate(record.ops):
                key = record.keys[number * 16 : number * 16 + 16]
                holder = record.holders[number * HOLDER_BYTES : (number + 1) * HOLDER_BYTES]
                old = table.get(key) or b""
                table[key] = add_holder(old, holder) if op == OP_ADD else remove_holder(old, holder)
            progress["updates"] += len(record.ops)

    app.agent(topic, name="stock")(apply)
    app.finalize()
    _fill(table, filled)
    await app.start()
    try:
        while not progress["began"]:  # noqa: ASYNC110 # a counter tells nobody
            await asyncio.sleep(0.01)
        while progress["updates"] < expected and time.monotonic() - progress["began"] < _BASELINE_SECONDS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        # An assignment only queues its changelog record: the table is written once the brokers have them all.
        updates = int(progress["updates"])
        await _until_written(app, kafka.topic("stock-block_index-changelog"), args.partitions, updates)
        return updates / (time.monotonic() - progress["began"])
    finally:
        await app.stop()


def _fill(table: Any, made: list[tuple[int, bytes]]) -> None:
    """Put what a stock table is to hold straight into its database: by assignments it would take ten minutes."""
    values: dict[int, dict[bytes, bytes]] = {}
    for partition, value in made:
        record, known = decode_blocks(value), values.setdefault(partition, {})
        for number in range(len(record.ops)):
            key = record.keys[number * 16 : number * 16 + 16]
            known[key] = add_holder(known.get(key, b""), record.holders[number * HOLDER_BYTES :][:HOLDER_BYTES])
    for partition, known in values.items():
        database = table.data._db_for_partition(partition)
        for key, value in known.items():
            database.put(key, value)


async def _until_written(app: Any, changelog: str, partitions: int, updates: int) -> None:
    tps = [TP(changelog, number) for number in range(partitions)]
    while sum((await app.consumer.highwaters(*tps)).values()) < updates:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def _stock_app(kafka: KafkaSettings, folder: Path) -> Any:
    return faust.App(
        kafka.topic("stock"),
        broker=f"kafka://{kafka.brokers}",
        store="rocksdb://",
        datadir=str(folder),
        topic_allow_declare=False,
        topic_disable_leader=True,
        topic_partitions=kafka.partitions,
        web_enabled=False,
        key_serializer="raw",
        value_serializer="raw",
        stream_wait_empty=False,
    )


async def _resolve_index(bootstrap: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Return blocks a second, and the process's seconds of CPU a block, which other work changes less.

    The clock starts with the worker: at the first commit of the index many more blocks are resolved already, and the
    smaller the load, the larger their part of it.
    """
    kafka = await _rig.fresh_topics(bootstrap, args.partitions)
    blocks = int(_ENGINE_BLOCKS * args.scale)
    start = _rig.applied("index")
    async with _rig.producer(kafka) as target:
        pending = [
            await target.send(kafka.topic(topics.EVENTS), value, key=key, headers=told, partition=partition)
            for key, value, told, partition in _engine_messages(blocks, kafka.partitions)
        ]
        await asyncio.gather(*pending)
    async with _rig.worker(kafka, folder):
        first, began, cpu = _rig.applied("index"), time.monotonic(), time.process_time()
        ended = await _rig.until_applied("index", start + blocks)
        cpu = time.process_time() - cpu
    counted = start + blocks - first
    return counted / (ended - began), cpu / counted


def _engine_messages(blocks: int, partitions: int) -> Iterator[tuple[bytes, bytes, list[tuple[str, bytes]], int]]:
    """Yield raw vLLM messages as the bridge puts them on ``kv-events``: key, value, headers, partition.

    Each message is an engine step of 64 blocks in two events, one that continues an earlier prompt and one new.
    """
    half = _BLOCKS_PER_MESSAGE // 2
    for number in range(-(-blocks // _BLOCKS_PER_MESSAGE)):
        pod = f"bench-{number % _ENGINES}"
        base = number * _BLOCKS_PER_MESSAGE
        events: list[Mapping[str, Any]] = []
        for at in (base, base + half):
            if keys := range(at, min(at + half, blocks)):
                tokens = list(range(keys.start * 16, keys.stop * 16))
                events.append(stored([(1 << 63) | key for key in keys], tokens))
        value = encode_batch(time.time(), events, 0)
        told = headers(number // _ENGINES, 1_700_000_000, "bench")
        yield pod.encode(), value, told, pod_ids.pod_partition(pod, partitions)
