"""What benchmarks of the stream worker share: a broker, topics of their own, a worker in this process, made-up load."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.kafka.sending import started_producer
from kvatlas.bridge.model import epochs, pod_ids, topics
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.streams import metrics
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, Run, encode_blocks
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService

PARTITIONS: Final = 8
UPDATES_PER_RECORD: Final = 512
_READY_SECONDS: Final = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that these benchmarks have in common."""
    parser.add_argument("--brokers", default="", help="a running Kafka; default: one of this benchmark's own")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full size, 0 to 1")
    parser.add_argument("--partitions", type=int, default=PARTITIONS)
    parser.add_argument("--work-dir", type=Path, default=None, help="folder for state and a broker's data")


@contextlib.contextmanager
def broker(brokers: str, work_dir: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Give a broker's address, of one of its own where none is named, and a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="kvatlas-bench-", dir=work_dir) as name:
        folder = Path(name)
        if brokers:
            yield brokers, folder
            return
        with KafkaNode(folder / "kafka") as node:
            yield node.bootstrap, folder


@contextlib.contextmanager
def beside(work: Callable[..., object], *given: object) -> Iterator[None]:
    """Run a function in a process of its own, which ends with the block."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=given, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


async def fresh_topics(bootstrap: str, partitions: int, app: str = "kvatlas") -> KafkaSettings:
    """Make fresh topics; returns how to reach them."""
    kafka = KafkaSettings(
        brokers=bootstrap, topic_prefix=f"bench-{os.getpid()}-{time.time_ns() % 10**9}-", partitions=partitions
    )
    await ensure_topics(kafka, (*topics.TOPICS, *topics.changelog_topics(app)))
    return kafka


@contextlib.asynccontextmanager
async def worker(kafka: KafkaSettings, folder: Path, **settings: Any) -> AsyncIterator[WorkerService]:
    """Run a worker in this process until the block ends."""
    service = WorkerService(WorkerSettings(state_dir=str(folder), **settings), kafka)
    await service.start()
    tune_interpreter()  # as the worker's own process does
    try:
        await asyncio.wait_for(service.ready.wait(), _READY_SECONDS)
        yield service
    finally:
        await service.stop()


@contextlib.asynccontextmanager
async def producer(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaProducer]:
    """Give a started producer."""
    made = await started_producer(kafka, "kvatlas-bench", max_request_size=32 * 1024 * 1024, linger_ms=5)
    try:
        yield made
    finally:
        await made.stop()


def applied(agent: str) -> int:
    """Return the updates that an agent of this process has committed so far."""
    return int(metrics.UPDATES.labels(agent)._value.get())


async def until_applied(agent: str, target: int, *, stalled_seconds: float = 60.0) -> float:
    """Wait until an agent has committed so many updates; returns the monotonic time of the last one.

    Raises:
        TimeoutError: nothing was committed for a long time.
    """
    seen, since = -1, time.monotonic()
    while True:
        now, count = time.monotonic(), applied(agent)
        if count >= target:
            return now
        if count != seen:
            seen, since = count, now
        elif now - since > stalled_seconds:
            raise TimeoutError(f"{agent}: {count} of {target} updates after {stalled_seconds} s without one")
        await asyncio.sleep(0.01)


class Load:
    """Made-up block updates: pods that store runs of blocks, and drop them again.

    Args:
        pods: pods that hold the blocks.
        partitions: partitions of ``kv-blocks``.
        seed: makes the same load again.
        updates_per_record: about how many updates share a ``kv-blocks`` record; 1 for a record of its own each.

    Attributes:
        refs: references of the pods.
        epoch: the pods' epoch.
        sequence: of the last message; a second load of the same pods goes on behind it.
    """

    def __init__(
        self, pods: int, partitions: int, seed: int = 7, *, updates_per_record: int = UPDATES_PER_RECORD
    ) -> None:
        self._updates_per_record = updates_per_record
        self._random = random.Random(seed)  # noqa: S311 # load, not secrets
        self._numbers = np.random.default_rng(seed)
        self.refs = [pod_ids.pod_ref(f"bench-{number}") for number in range(pods)]
        self.epoch = epochs.epoch_of(1_700_000_000)
        self.sequence = 0
        self._partitions = partitions

    def keys(self, blocks: int) -> np.ndarray[Any, Any]:
        """Return new block keys, 16 bytes each."""
        return self._numbers.integers(0, 256, (blocks, 16), dtype=np.uint8)

    def records(self, keys: np.ndarray[Any, Any], pod: int, op: int = OP_ADD) -> list[tuple[int, bytes]]:
        """Return (partition, ``kv-blocks`` record) for one operation of a pod on keys, in order."""
        holder = pack_holder(self.refs[pod], 0, int(Tier.GPU), 0, 0, self.epoch)
        heads = np.ascontiguousarray(keys[:, :4]).view(">u4")[:, 0].astype(np.uint32) % np.uint32(self._partitions)
        made = []
        step = self._updates_per_record * self._partitions if self._updates_per_record > 1 else 1
        for start in range(0, len(keys), step):
            self.sequence += 1
            part, where = keys[start : start + step], heads[start : start + step]
            for partition in range(self._partitions):
                rows = part[where == partition]
                if len(rows):
                    run = Run(self.refs[pod], self.epoch, self.sequence, self.sequence, len(rows))
                    packed = encode_blocks(
                        [run], rows.tobytes(), bytes([op]) * len(rows), holder * len(rows), time.time_ns()
                    )
                    made.append((partition, packed))
        return made

    def churn(self, keys: np.ndarray[Any, Any], updates: int) -> list[tuple[int, bytes]]:
        """Return updates as a full fleet makes them: every pod stores new blocks and drops as many old ones.

        Half of the stores are of blocks that another pod has just stored (a shared prefix), half are new.
        """
        made: list[tuple[int, bytes]] = []
        quarter = max(updates // (4 * len(self.refs)), 1)
        shared = self.keys(quarter)
        done = 0
        while done < updates:
            for pod in range(len(self.refs)):
                old = keys[self._numbers.integers(0, len(keys), min(2 * quarter, 32_768))]
                fresh = self.keys(min(quarter, 16_384))
                for part, op in ((shared[:16_384], OP_ADD), (fresh, OP_ADD), (old, OP_REMOVE)):
                    made += self.records(part, pod, op)
                    done += len(part)
                    if done >= updates:
                        return made
            shared = self.keys(quarter)
        return made


def count_updates(made: Sequence[tuple[int, bytes]]) -> int:
    """Return the updates in encoded records."""
    from kvatlas.streams.index.blocks_record import decode_blocks  # noqa: PLC0415

    return sum(len(decode_blocks(value).ops) for _, value in made)


async def send(target: AIOKafkaProducer, topic: str, made: Sequence[tuple[int, bytes]]) -> None:
    """Send records and wait until the brokers have them."""
    pending = [await target.send(topic, value, partition=partition) for partition, value in made]
    await asyncio.gather(*pending)
