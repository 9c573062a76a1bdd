"""What benchmarks of scores share: services as processes, and an index that is filled through Kafka."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.block_key import block_keys, root_key
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.brokers.process import tail
from kvatlas.deploy.processes.child import document
from kvatlas.deploy.processes.supervisor import Child
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings

MODEL: Final = "bench"
PODS: Final = 8
BLOCK_TOKENS: Final = 16
#: Longest prompt: all pods hold all of it.
PROMPT_TOKENS: Final = 131_072
_READY_SECONDS: Final = 120.0
_APPLIED_SECONDS: Final = 600.0
_STOP_SECONDS: Final = 20.0


class ServiceError(KvatlasError):
    """A service of the benchmark did not become ready; the text ends with its log."""


def tokens(count: int) -> bytes:
    """Return the first token ids of the prompt, packed."""
    return array("I", range(1, count + 1)).tobytes()


def pod_name(number: int) -> str:
    """Return the name of a pod of :class:`_rig.Load`."""
    return f"bench-{number}"


def others(load: _rig.Load, blocks: int) -> list[np.ndarray[Any, Any]]:
    """Return the keys beside the prompt: per pod those that it alone holds."""
    share = max(blocks - PROMPT_TOKENS // BLOCK_TOKENS, 0) // len(load.refs)
    return [load.keys(share) for _ in load.refs]


async def fill(kafka: KafkaSettings, load: _rig.Load, beside: Sequence[np.ndarray[Any, Any]]) -> dict[int, int]:
    """Announce the pods, let all of them hold the prompt and each its other blocks; returns the last offsets."""
    keys = block_keys(root_key(MODEL), tokens(PROMPT_TOKENS), BLOCK_TOKENS)
    prompt = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)
    last: dict[int, int] = {}
    async with _rig.producer(kafka) as target:
        for number in range(len(load.refs)):
            name = pod_name(number)
            record = PodRecord(
                pod=name,
                writer=pod_ids.WRITER_STREAMS,
                model=MODEL,
                block_size_tokens=BLOCK_TOKENS,
                epoch=load.epoch,
                valid_from=load.epoch,
            )
            await target.send(
                kafka.topic(topics.PODS), records.encode(record), key=pod_ids.pod_key(pod_ids.WRITER_STREAMS, name)
            )
        for number, more in enumerate(beside):
            for part in (prompt, more):
                pending = [
                    await target.send(kafka.topic(topics.BLOCKS), value, partition=partition)
                    for partition, value in load.records(part, number)
                ]
                for sent in await asyncio.gather(*pending):
                    last[sent.partition] = max(sent.offset, last.get(sent.partition, -1))
    return last


def until_filled(address: str, last: dict[int, int]) -> None:
    """Wait until a scorer's answers are based on these offsets and name all pods.

    Raises:
        ServiceError: that does not happen.
    """
    deadline = time.monotonic() + _APPLIED_SECONDS
    packed = tokens(8192)
    with ScorerClient(address) as client:
        while time.monotonic() < deadline:
            answer = client.score(MODEL, tokens=array("I", packed))
            applied = {part.partition: part.applied_offset for part in answer.freshness.partitions}
            if len(answer.scores) == PODS and all(applied.get(number, -1) >= at for number, at in last.items()):
                return
            time.sleep(0.2)
    raise ServiceError(f"updates up to {last} were not applied within {_APPLIED_SECONDS} s")


@contextlib.contextmanager
def scoring(part: str, kafka: KafkaSettings, folder: Path) -> Iterator[str]:
    """Run a part that scores, in a process of its own; gives the scorer's address.

    Raises:
        KvatlasError: it ended, or took too long to be ready.
    """
    sections = {
        "kafka": kafka,
        "log": LogSettings(),
        "worker": WorkerSettings(state_dir=str(folder / "state")),
        "scorer": ScorerSettings(listen="127.0.0.1:0"),
        "tokenizer": TokenizerSettings(),
    }
    log = folder / f"{part}.log"
    child = Child(part, document(part, sections), log)
    try:
        until = time.monotonic() + _READY_SECONDS
        while not child.ready.wait(0.1):
            if (code := child.ended()) is not None:
                raise child.told(code)
            if time.monotonic() > until:
                raise ServiceError(f"not ready; its log ends:\n{tail(log, 30)}")
        yield child.address("scorer")
    finally:
        child.terminate()
        child.wait(time.monotonic() + _STOP_SECONDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of these benchmarks."""
    _rig.add_arguments(parser)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index")
