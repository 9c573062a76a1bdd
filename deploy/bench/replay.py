"""How fast the log is read and past states are rebuilt, from a real Kafka.

Cases: ``decode`` (messages/s of ``kv-events``, read, summed up, filtered by model and event type; baseline: the same
records read and dropped) and ``rebuild`` (messages/s folded into a scratch index at the end of the log; baseline: the
same messages read and their events decoded, tokens and all, which is the first part of folding them).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.adapters.vllm import decode
from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import figure, headers, removed, stored
from kvatlas.deploy.history.filters import Filter, Wanted
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import EARLIEST, LATEST
from kvatlas.deploy.history.rebuild import rebuild
from kvatlas.streams.resolve.resolver import ResolveOptions

HELP: Final = "messages/s of the log decoded, and folded into a past state, beside reading and decoding them plainly"

_PODS: Final = 16
_MESSAGES: Final = 100_000
_BLOCKS: Final = 8
_BLOCK_TOKENS: Final = 16
_MODEL: Final = "bench-model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fill a log, read it, rebuild from it."""
    with _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder):
        yield from asyncio.run(_measure(args, bootstrap, folder))


async def _measure(args: argparse.Namespace, bootstrap: str, folder: Path) -> list[dict[str, Any]]:
    kafka = await _rig.fresh_topics(bootstrap, args.partitions)
    count = max(1, round(_MESSAGES * args.scale))
    await _fill(kafka, args.partitions, count)
    async with LogReader(kafka) as reader:
        span = await reader.range(topics.EVENTS, EARLIEST, LATEST)
        began = time.perf_counter()
        read = sum([len(chunk) async for chunk in reader.read(span)])
        plain = read / (time.perf_counter() - began)
        chosen = Filter(Wanted(models=frozenset({_MODEL}), types=frozenset({"stored", "removed"})))
        clocks = _clocks()
        matched = sum([1 async for record in _each(reader, span) if chosen.message(record)])
        decoded = _rates(matched, clocks)
        assert matched == read == count
        clocks, limits = _clocks(), Limits()
        decoded_events = sum([len(decode(record.value or b"", limits).events) async for record in _each(reader, span)])
        events = _rates(count, clocks)
        assert decoded_events >= count
        clocks = _clocks()
        past = await rebuild(
            reader, kafka, LATEST, folder=folder / "past", options=ResolveOptions(), clock=time.time_ns
        )
        rebuilt, updates = _rates(count, clocks), past.counts["updates"]
        past.close(keep=False)
    rebuild_row = _row("rebuild", rebuilt, "messages/s", baseline=events[0])
    return [
        _row("decode", decoded, "messages/s", baseline=plain),
        rebuild_row | {"updates": round(rebuilt[0] * updates / count), "cpu_ratio": round(rebuilt[1] / events[1], 3)},
    ]


async def _each(reader: LogReader, span: Any) -> AsyncIterator[Any]:
    async for chunk in reader.read(span):
        for record in chunk:
            yield record


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _rates(count: int, since: tuple[float, float]) -> tuple[float, float]:
    """Return how many a second, and how many a second of CPU time, which other load on the machine changes little."""
    wall, cpu = (now - then for now, then in zip(_clocks(), since, strict=True))
    return count / wall, count / cpu


def _row(case: str, rates: tuple[float, float], unit: str, baseline: float) -> dict[str, Any]:
    value, per_cpu = rates
    return figure(case, value, unit, per_cpu_second=per_cpu, baseline=baseline, ratio=value / baseline)


async def _fill(kafka: KafkaSettings, partitions: int, count: int) -> None:
    """Send messages of one stored event of 8 blocks; every fourth also removes the blocks of an older one."""
    rng = random.Random(1)  # noqa: S311 - the same load each run
    topic = kafka.topic(topics.EVENTS)
    async with _rig.producer(kafka) as producer:
        for number in range(count):
            pod = f"pod-{number % _PODS}"
            sequence = number // _PODS
            await producer.send(
                topic,
                _payload(rng, number, sequence),
                key=pod.encode(),
                partition=pod_ids.pod_partition(pod, partitions),
                headers=headers(sequence, 1, _MODEL),
            )
        await producer.flush()


def _payload(rng: random.Random, number: int, sequence: int) -> bytes:
    hashes = [(number << 8) + block for block in range(_BLOCKS)]
    events: list[Mapping[str, Any]] = [stored(hashes, [rng.randrange(32_000) for _ in range(_BLOCKS * _BLOCK_TOKENS)])]
    if sequence % 4 == 3:
        old = ((number - _PODS) << 8) + _BLOCKS - 1
        events.append(removed([old]))
    return encode_batch(1.0, events, 0)
