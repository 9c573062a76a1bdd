"""What benchmarks of scores share: services as processes, and an index that is filled through Kafka."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import queue
import subprocess
import sys
import threading
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
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig
from kvatlas.scorer.client import ScorerClient

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


class Service:
    """A `kvatlas` command in a process of its own; ends with the block.

    Args:
        log: file of its standard error.
        words: the command line behind `kvatlas`.
    """

    def __init__(self, log: Path, *words: str) -> None:
        self._log = log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(  # noqa: S603 # our own command line
                [sys.executable, "-m", "kvatlas.deploy", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ready(self) -> dict[str, str]:
        """Wait for the ready line; returns its addresses by name.

        Raises:
            ServiceError: it ended, or took too long.
        """
        with contextlib.suppress(queue.Empty):
            words = self._lines.get(timeout=_READY_SECONDS).split()
            if words[:1] == ["ready"]:
                return dict(word.split("=", 1) for word in words[1:] if "=" in word)
        raise ServiceError(f"not ready; its log ends:\n{self._log.read_text(errors='replace')[-2000:]}")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def flags(kafka: KafkaSettings) -> tuple[str, ...]:
    """Return the flags that lead a service to these topics."""
    return (f"--brokers={kafka.brokers}", f"--topic-prefix={kafka.topic_prefix}", f"--partitions={kafka.partitions}")


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
def scoring_worker(kafka: KafkaSettings, folder: Path, *words: str) -> Iterator[dict[str, str]]:
    """Run a worker with a scorer; gives their addresses."""
    command = ("worker", "--with-scorer", f"--state-dir={folder / 'state'}", "--scorer-listen=127.0.0.1:0")
    with Service(folder / "worker.log", *command, *flags(kafka), *words) as service:
        yield service.ready()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of these benchmarks."""
    _rig.add_arguments(parser)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index")
