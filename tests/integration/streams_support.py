"""What the tests of the stream worker share: topics, worker processes, a fleet on the log, waiting for the truth."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import PodAudit, audit
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.streams.v1 import block_index_pb2 as pb
from tests.log_fleet import LogFleet

PARTITIONS = 4


async def make_topics(brokers: str, prefix: str, partitions: int = PARTITIONS) -> KafkaSettings:
    """Make a deployment's topics."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=prefix, partitions=partitions)
    await ensure_topics(kafka, (*topics.TOPICS, *topics.changelog_topics("kvatlas")))
    return kafka


class WorkerProcess:
    """A `kvatlas worker` in a process of its own, which signals reach; supervised, it is the supervisor's."""

    def __init__(self, kafka: KafkaSettings, state_dir: Path, *flags: str, supervised: bool = False) -> None:
        self.log = state_dir.with_suffix(".log")
        self._out = self.log.open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "kvatlas.deploy",
                "worker",
                f"--brokers={kafka.brokers}",
                f"--topic-prefix={kafka.topic_prefix}",
                f"--partitions={kafka.partitions}",
                f"--state-dir={state_dir}",
                *(() if supervised else ("--no-supervise",)),
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=self._out,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("KVATLAS_")}, "PYTHONUNBUFFERED": "1"},
        )

    async def ready(self, timeout: float = 150.0) -> str:
        """Wait for the ready line; returns the lookup address."""
        assert self.process.stdout is not None
        kill = asyncio.get_running_loop().call_later(timeout, self.process.kill)  # ends the read below
        line = await asyncio.to_thread(self.process.stdout.readline)
        kill.cancel()
        assert line.startswith(b"ready worker="), (line, self.tail())
        return line.decode().strip().partition("=")[2]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def tail(self) -> str:
        """End of the log."""
        return self.log.read_text()[-4000:]

    def close(self) -> None:
        """Make sure that nothing stays."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._out.close()


@contextlib.asynccontextmanager
async def producing(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaProducer]:
    """A started producer."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka.brokers, max_request_size=16 * 1024 * 1024)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


def fleet_of(kafka: KafkaSettings, pods: int = 4, blocks: int = 256, **settings: Any) -> LogFleet:
    """A small fleet with much eviction."""
    return LogFleet(
        kafka, kafka.partitions, SimPlan(pods=pods, blocks=blocks, system_tokens=128, sessions=16, **settings)
    )


async def until_true(
    kafka: KafkaSettings,
    truth: Mapping[str, Mapping[str, frozenset[bytes]]],
    timeout: float = 120.0,
    version: str = topics.BASE_VERSION,
) -> list[PodAudit]:
    """Audit until nothing differs; returns the last audit."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            found = await audit(kafka, truth, version=version)
        except Exception:  # workers come and go meanwhile
            if time.monotonic() > deadline:
                raise
            found = []
        else:
            if not any(pod.ghosts or pod.missing for pod in found) or time.monotonic() > deadline:
                return found
        await asyncio.sleep(0.5)


def assert_true(found: list[PodAudit], pods: int) -> None:
    """The index is what the pods hold, and that is something."""
    assert len(found) == pods
    assert sum(pod.held for pod in found) > 100
    assert not [pod for pod in found if pod.ghosts or pod.missing or pod.suspect_ghosts], found


def lookup_over(channel: Any, keys: list[bytes], *, standby: bool = True) -> Any:
    """Ask over a connection; to be waited for."""
    request = pb.LookupRequest(keys=b"".join(keys), partition_count=PARTITIONS, allow_standby=standby)
    return stub_of(channel, pb).Lookup(request)


async def lookup(address: str, keys: list[bytes], *, standby: bool = True) -> pb.LookupResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        answer: pb.LookupResponse = await lookup_over(channel, keys, standby=standby)
        return answer


def unread_bytes(address: str) -> int:
    """Bytes that wait in the sockets of a port for its process to read them."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return sum(int(line[4].partition(":")[2], 16) for line in lines if line[1].endswith(port) and line[3] == "01")


def roles_in(answer: pb.LookupResponse) -> set[int]:
    return {state.role for state in answer.partitions}


def names_owner(answer: pb.LookupResponse, other: str) -> bool:
    """Some partitions are answered, and all others are said to be the other worker's."""
    if roles_in(answer) != {pb.PartitionState.ACTIVE, pb.PartitionState.ELSEWHERE}:
        return False
    return {state.owner for state in answer.partitions if state.role == pb.PartitionState.ELSEWHERE} == {other}


async def wait_answer(address: str, keys: list[bytes], wanted: Callable[[pb.LookupResponse], object]) -> None:
    """Ask until an answer is as wanted."""
    deadline = time.monotonic() + 90
    while not wanted(answer := await lookup(address, keys)):
        assert time.monotonic() < deadline, answer.partitions
        await asyncio.sleep(0.2)


async def wait_roles(address: str, keys: list[bytes], roles: set[int]) -> None:
    """Ask until the answering partitions have exactly these roles."""
    await wait_answer(address, keys, lambda answer: roles_in(answer) == roles)
