"""``kvatlas bench freshness``: how long after an engine message is on the log a lookup sees it, under half load."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc

from kvatlas.bridge import records
from kvatlas.bridge.adapters.fields import encode_batch
from kvatlas.bridge.block_key import block_keys, pack_tokens, root_key
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench.index import engine_messages
from kvatlas.streams.v1 import block_index_pb2 as pb
from kvatlas.streams.v1 import block_index_pb2_grpc as pb_grpc

HELP: Final = "from an engine message on the log to its blocks in a lookup, while others are ingested (ms)"

_LOAD_BLOCKS_PER_SECOND: Final = 20_000
_PROBES: Final = 200
_TICK_SECONDS: Final = 0.01

aio: Any = getattr(grpc, "aio")  # noqa: B009 # the stubs of grpc leave out its asyncio half


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)
    parser.add_argument("--load", type=int, default=_LOAD_BLOCKS_PER_SECOND, help="blocks/s ingested meanwhile")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    with _rig.broker(args) as (bootstrap, folder):
        fresh, lookups = asyncio.run(_measure(bootstrap, folder / "state", args))
        for case, found in (("log to lookup", fresh), ("lookup of 512 keys", lookups)):
            cuts = statistics.quantiles(found, n=100)
            yield {
                "bench": "freshness",
                "case": case,
                "value": round(cuts[49], 2),
                "unit": "ms",
                "p50": round(cuts[49], 2),
                "p99": round(cuts[98], 2),
            }


async def _measure(bootstrap: str, folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    kafka = await _rig.topics(bootstrap, args.partitions)
    probes = max(int(_PROBES * args.scale), 20)
    topic = kafka.topic(records.EVENTS)
    fresh: list[float] = []
    lookups: list[float] = []
    async with _rig.producer(kafka) as target, _rig.worker(kafka, folder) as service:
        load = asyncio.create_task(_load(target, topic, args.load, kafka.partitions))
        async with aio.insecure_channel(service.address) as channel:
            stub: Any = pb_grpc.BlockIndexStub(channel)
            for number in range(probes):
                key, value, headers, keys = _probe(number)
                partition = records.pod_partition(key.decode(), kafka.partitions)
                began = time.perf_counter()
                await target.send(topic, value, key=key, headers=headers, partition=partition)
                while True:
                    answer = await stub.Lookup(pb.LookupRequest(keys=keys))
                    if b"\x00" * 4 not in {answer.index[at : at + 4] for at in range(0, len(answer.index), 4)}:
                        break
                    await asyncio.sleep(0.001)
                fresh.append((time.perf_counter() - began) * 1e3)
                began = time.perf_counter()
                await stub.Lookup(pb.LookupRequest(keys=keys * 64))
                lookups.append((time.perf_counter() - began) * 1e3)
                await asyncio.sleep(0.02)
        load.cancel()
    return fresh, lookups


async def _load(target: Any, topic: str, blocks_per_second: int, partitions: int) -> None:
    """Send engine messages at a steady rate until cancelled."""
    messages = engine_messages(10**9, 8, partitions)
    sent, began = 0, time.monotonic()
    while True:
        due = (time.monotonic() - began) * blocks_per_second
        while sent < due:
            key, value, headers, partition = next(messages)
            await target.send(topic, value, key=key, headers=headers, partition=partition)
            sent += 64
        await asyncio.sleep(_TICK_SECONDS)


def _probe(number: int) -> tuple[bytes, bytes, list[tuple[str, bytes]], bytes]:
    """Return key, value and headers of one small engine message, and the packed keys of its eight blocks."""
    tokens = [(number << 8) + at for at in range(128)]
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(number * 8, number * 8 + 8)),
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": 16,
        "medium": "GPU",
    }
    headers = [
        (records.H_SEQUENCE, str(number).encode()),
        (records.H_INCARNATION, b"1700000000"),
        (records.H_RECEIVE_NS, str(time.time_ns()).encode()),
        (records.H_ENGINE, b"vllm"),
        (records.H_MODEL, b"probe"),
        (records.H_CONTENT_TYPE, records.CONTENT_ENGINE.encode()),
    ]
    keys = b"".join(block_keys(root_key("probe"), pack_tokens(tokens), 16))
    return b"probe", encode_batch(time.time(), [event], 0), headers, keys
