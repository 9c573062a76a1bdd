"""``kvatlas bench recovery``: how fast a worker has its tables back, from Kafka alone and from its own disk.

The baseline is a client that reads the same changelog and does nothing with it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import figure
from kvatlas.streams import metrics
from kvatlas.streams.faust_app.app import BLOCK_INDEX
from kvatlas.streams.options import WorkerSettings

HELP: Final = "restore of a block index: entries/s from the changelog alone, seconds from local state after SIGKILL"

_ENTRIES: Final = 2_300_000
_FETCH_BYTES: Final = 8 * 1024 * 1024
_POLL_RECORDS: Final = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    with _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder):
        state = folder / "state"
        kafka = asyncio.run(_fill(bootstrap, args))
        _killed_after_filling(kafka, state, int(_ENTRIES * args.scale))
        seconds, entries = asyncio.run(_restart(kafka, state))
        yield figure("local", seconds, "s", entries_read=entries)
        shutil.rmtree(state)
        plain = asyncio.run(_read_plainly(kafka))
        seconds, entries = asyncio.run(_restart(kafka, state))
        told = {"entries_read": entries, "seconds": seconds, "baseline": plain, "ratio": seconds / plain}
        yield figure("changelog", entries / seconds, "entries/s", **told)


async def _fill(bootstrap: str, args: argparse.Namespace) -> KafkaSettings:
    kafka = await _rig.fresh_topics(bootstrap, args.partitions)
    load = _rig.Load(1, args.partitions)
    async with _rig.producer(kafka) as target:
        made = load.records(load.keys(int(_ENTRIES * args.scale)), 0)
        await _rig.send(target, kafka.topic(topics.BLOCKS), made)
    return kafka


def _killed_after_filling(kafka: KafkaSettings, state: Path, entries: int) -> None:
    """Apply everything in a worker process that then kills itself, as a crash would."""
    process = multiprocessing.get_context("spawn").Process(target=_fill_and_die, args=(kafka, state, entries))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the filling worker ended with {process.exitcode}")


def _fill_and_die(kafka: KafkaSettings, state: Path, entries: int) -> None:
    async def fill() -> None:
        async with _rig.worker(kafka, state, role="index"):
            await _rig.until_applied("index", entries)
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(fill())


async def _read_plainly(kafka: KafkaSettings) -> float:
    """Return the seconds that reading the changelog from its start to its end takes, after the client has started."""
    topic = kafka.topic(topics.changelog_topics(WorkerSettings().versioned_app)[1].name)
    async with AIOKafkaConsumer(
        **client_config(kafka, "kvatlas-bench"), auto_offset_reset="earliest", max_partition_fetch_bytes=_FETCH_BYTES
    ) as consumer:
        partitions = [TopicPartition(topic, number) for number in range(kafka.partitions)]
        ends = await consumer.end_offsets(partitions)
        began = time.monotonic()
        consumer.assign(partitions)
        while any([await consumer.position(at) < end for at, end in ends.items()]):
            await consumer.getmany(timeout_ms=100, max_records=_POLL_RECORDS)
        return time.monotonic() - began


async def _restart(kafka: KafkaSettings, state: Path) -> tuple[float, int]:
    """Start a worker; returns seconds from its assignment to ready, and changelog entries read.

    The group first has to give up the dead member, which takes the session timeout and is not part of the restore.
    """
    before = _restored()
    assignments = metrics.REBALANCES._value.get()
    began = 0.0

    async def note() -> None:
        nonlocal began
        while metrics.REBALANCES._value.get() == assignments:  # noqa: ASYNC110 # a counter tells nobody
            await asyncio.sleep(0.002)
        began = time.monotonic()

    noting = asyncio.create_task(note())
    async with _rig.worker(kafka, state, role="index"):
        ended = time.monotonic()
        await noting
        return ended - began, _restored() - before


def _restored() -> int:
    return int(metrics.RESTORED.labels(BLOCK_INDEX)._value.get())
