"""``kvatlas bench library``: the index in one process, per key and per prompt, and raw engine messages through it."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import redis.asyncio as aioredis

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model import epochs, pod_ids
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.deploy.bench._figures import figure, removed, spread, stored
from kvatlas.deploy.bench._mirror import mirror_rate
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.backends.memory import MemoryBackend
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.indexer import Indexer
from kvatlas.streams.index.blocks_record import OP_ADD, BlocksRecord, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import pack_holder

HELP: Final = "the index as a library: add, lookup, score 8,192 tokens, raw engine messages"

_MODEL: Final = "bench"
_KEYS: Final = 10_000
_BATCH: Final = 64
_SIZE: Final = 16
_EPOCH: Final = epochs.epoch_of(5)
_CASES: Final = ("memory-add", "memory-lookup", "memory-score-8192", "redis-score-8192", "events", "mirror")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--case", action="append", choices=_CASES, help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=200, help="prompts scored (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--pods", type=int, default=8, help="pods that hold the prompt (default %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=200_000, help="blocks of `events` and `mirror` (default %(default)s)"
    )


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures.

    Raises:
        KvatlasError: an answer is wrong, or a case needs a server that is not installed.
    """
    wanted = args.case or _CASES
    if "memory-add" in wanted:
        yield spread("memory-add", _adds(), "us/key")
    if "memory-lookup" in wanted:
        yield spread("memory-lookup", _lookups(), "us/key")
    if "memory-score-8192" in wanted:
        yield spread("memory-score-8192", asyncio.run(_scores(MemoryBackend(), args)), "ms")
    if "redis-score-8192" in wanted:
        yield asyncio.run(_redis(args))
    if "events" in wanted:
        yield asyncio.run(_events(args))
    if "mirror" in wanted:
        yield _mirror(args)


# --- per key --------------------------------------------------------------------------------------------------------


def _keys(count: int, seed: int = 1) -> list[bytes]:
    tokens = random.Random(seed).choices(range(32_000), k=count * _SIZE)  # noqa: S311 - the same keys every time
    return block_keys(root_key(_MODEL), pack_tokens(tokens), _SIZE)


def _record(pod: str, sequence: int, keys: list[bytes]) -> BlocksRecord:
    ref = pod_ids.pod_ref(pod)
    holders = pack_holder(ref, 0, Tier.GPU, Kind.FULL, 0, _EPOCH) * len(keys)
    runs = [Run(ref, _EPOCH, sequence, sequence, len(keys))]
    return decode_blocks(encode_blocks(runs, b"".join(keys), bytes([OP_ADD]) * len(keys), holders, 0))


def _batches(pod: str, keys: list[bytes]) -> list[BlocksRecord]:
    starts = range(0, len(keys), _BATCH)
    return [_record(pod, number, keys[start : start + _BATCH]) for number, start in enumerate(starts)]


def _adds() -> list[float]:
    batches = _batches("pod", _keys(_KEYS))
    found = []
    for _ in range(51):
        backend = MemoryBackend()
        began = time.perf_counter()
        for record in batches:
            backend.apply_now(record)
        found.append((time.perf_counter() - began) * 1e6 / _KEYS)
    return found


def _lookups() -> list[float]:
    keys, backend = _keys(_KEYS), MemoryBackend()
    for record in _batches("pod", keys):
        backend.apply_now(record)
    found = []
    for _ in range(51):
        began = time.perf_counter()
        for start in range(0, _KEYS, _BATCH):
            values = backend.lookup_now(keys[start : start + _BATCH])
        found.append((time.perf_counter() - began) * 1e6 / _KEYS)
        if not all(values):
            raise KvatlasError("a key that was added was not found")
    return found


# --- per prompt -----------------------------------------------------------------------------------------------------


@contextmanager
def _engines(args: argparse.Namespace, tokens: list[int]) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Engines that each hold another share of one prompt: their endpoints, and the blocks that each must score."""
    blocks = len(tokens) // _SIZE
    publishers, held = [], {}
    try:
        for number in range(args.pods):
            held[f"pod-{number}"] = count = blocks * (number + 1) // args.pods
            publisher = _publisher(f"pod-{number}")
            publishers.append(publisher)
            publisher.publish([stored(list(range(1, count + 1)), tokens[: count * _SIZE])], timestamp=1.0)
        yield [f"{publisher.endpoint},{publisher.replay_endpoint}" for publisher in publishers], held
    finally:
        for publisher in publishers:
            publisher.close()


def _publisher(pod: str) -> EnginePublisher:
    publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@{pod}@{_MODEL}")
    publisher.start()
    return publisher


async def _applied(indexer: Indexer, pods: int, sequence: int) -> None:
    async with asyncio.timeout(120):
        while [record.last_sequence for record in indexer.pods()] != [sequence] * pods:  # noqa: ASYNC110 - a bench
            await asyncio.sleep(0.005)


def _prompt(args: argparse.Namespace) -> list[int]:
    return random.Random(2).choices(range(32_000), k=args.tokens)  # noqa: S311 - the same prompt every time


async def _scores(backend: Backend, args: argparse.Namespace) -> list[float]:
    tokens = _prompt(args)
    with _engines(args, tokens) as (engines, held):
        async with Indexer(backend, engines=engines) as indexer:
            await _applied(indexer, args.pods, 0)
            return [await _score(indexer, tokens, held) for _ in range(args.rounds)]


async def _score(indexer: Indexer, tokens: list[int], held: dict[str, int]) -> float:
    began = time.perf_counter()
    scored = await indexer.score_tokens(tokens, _MODEL)
    took_ms = (time.perf_counter() - began) * 1e3
    if {pod: entry.matched_blocks for pod, entry in scored.scores.items()} != held:
        raise KvatlasError(f"the scores are not what the pods hold: {scored}; expected {held}")
    return took_ms


async def _redis(args: argparse.Namespace) -> dict[str, Any]:
    """Scores from a local server, in turns with a plain pipelined multi-get of the same keys."""
    tokens = _prompt(args)
    found, plain = [], []
    with _server() as url, _engines(args, tokens) as (engines, held):
        async with Indexer(RedisBackend(url), engines=engines) as indexer:
            await _applied(indexer, args.pods, 0)
            names = [b"kvatlas:v1:b:" + key for key in indexer.block_keys(tokens, _MODEL)]
            async with aioredis.from_url(url) as client:
                for _ in range(args.rounds):
                    found.append(await _score(indexer, tokens, held))
                    began = time.perf_counter()
                    pipeline = client.pipeline(transaction=False)
                    pipeline.mget(names)
                    (values,) = await pipeline.execute()
                    plain.append((time.perf_counter() - began) * 1e3)
                    if not all(values):
                        raise KvatlasError("the plain multi-get does not find the blocks that were scored")
    return spread("redis-score-8192", found, "ms", statistics.median(plain))


@contextmanager
def _server() -> Iterator[str]:
    executable = shutil.which("redis-server") or shutil.which("valkey-server")
    if executable is None:
        raise KvatlasError(
            "redis-score-8192 and mirror need redis-server or valkey-server; `.ci/system-deps` installs it"
        )
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        command = [executable, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            deadline = time.monotonic() + 20
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if time.monotonic() > deadline:
                    raise KvatlasError(f"{executable} did not open port {port}")
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.wait()


# --- raw messages ---------------------------------------------------------------------------------------------------


def _payloads(blocks: int) -> list[bytes]:
    """Return vLLM messages of prompts of 64 blocks; every second message also evicts the prompt before."""
    rng = random.Random(3)  # noqa: S311 - the same messages every time
    found: list[bytes] = []
    before: list[int] = []
    for _ in range(blocks // _BATCH):
        names = [rng.getrandbits(64) for _ in range(_BATCH)]
        events: list[Mapping[str, Any]] = [stored(names, rng.choices(range(32_000), k=_BATCH * _SIZE))]
        if len(found) % 2:
            events.append(removed(before))
        before = names
        found.append(encode_batch(1.0 + len(found), events, 0))
    return found


async def _events(args: argparse.Namespace) -> dict[str, Any]:
    """Messages through the sockets until the last of them is in the index."""
    payloads = _payloads(args.blocks)
    publisher = _publisher("pod")
    try:
        engine = f"{publisher.endpoint},{publisher.replay_endpoint}"
        async with Indexer(engines=[engine]) as indexer:
            publisher.publish_raw(payloads[0])
            await _applied(indexer, 1, 0)
            began, spent = time.perf_counter(), time.process_time()
            for payload in payloads[1:]:
                publisher.publish_raw(payload)
            await _applied(indexer, 1, len(payloads) - 1)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
            if indexer.counts["blocks_stored"] != len(payloads) * _BATCH:
                raise KvatlasError(f"{indexer.counts['blocks_stored']} blocks applied of {len(payloads) * _BATCH}")
    finally:
        publisher.close()
    blocks = (len(payloads) - 1) * _BATCH
    return figure("events", blocks / seconds, "blocks/s", per_cpu_second=blocks / cpu_seconds)


def _mirror(args: argparse.Namespace) -> dict[str, Any]:
    """Changed entries into a mirror on a local server."""
    with _server() as url:
        rate, per_cpu_second = asyncio.run(mirror_rate(url, args.blocks))
    return figure("mirror", rate, "entries/s", per_cpu_second=per_cpu_second)
