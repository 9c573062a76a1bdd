"""What a replica of the log does besides following it; the log itself is in the integration tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvatlas.bridge.model import epochs, pod_ids
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.library.backends import Backend, MemoryBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from kvatlas.scorer.library.replica import Replica
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.index.blocks_record import OP_ADD, BlocksRecord, Run
from kvatlas.streams.index.holders import pack_holder

KEYS = [b"%016d" % number for number in range(50)]


def held(pod: str, incarnation: int) -> bytes:
    """A pod's holder under an epoch."""
    return pack_holder(pod_ids.pod_ref(pod), 0, Tier.GPU, 0, 0, epochs.epoch_of(incarnation))


def pod(name: str, incarnation: int) -> PodRecord:
    """A pod that counts from an incarnation on."""
    return PodRecord(
        pod=name,
        writer="bridge",
        epoch=epochs.epoch_of(incarnation),
        valid_from=epochs.epoch_of(incarnation),
        model="m",
    )


@pytest.mark.parametrize("make", [lambda _: MemoryBackend(), RocksBackend])
async def test_ended_epochs_leave_a_replica(make: Callable[[Path], Backend], tmp_path: Path) -> None:
    """What a restart or a removal ended is not kept for ever: a replica on disk would only grow."""
    backend, pods = make(tmp_path / "index"), PodTable()
    await backend.start()
    try:
        replica = Replica(KafkaSettings(brokers="127.0.0.1:1"), backend, pods, lambda _: None)
        for name in ("a", "b"):
            pods.put("bridge", name, pod(name, 5))
            run = Run(pod_ids.pod_ref(name), epochs.epoch_of(5), 0, 0, len(KEYS))
            ops = bytes([OP_ADD]) * len(KEYS)
            await backend.apply(BlocksRecord((run,), b"".join(KEYS), ops, held(name, 5) * len(KEYS), 0))
        both = b"".join(sorted([held("a", 5), held("b", 5)]))
        await replica.sweep()
        assert list(await backend.lookup(KEYS)) == [both] * len(KEYS)
        pods.put("bridge", "a", pod("a", 6))
        await replica.sweep()
        assert list(await backend.lookup(KEYS)) == [held("b", 5)] * len(KEYS)
        pods.apply(b"bridge|b", None)
        await replica.sweep()
        assert list(await backend.lookup(KEYS)) == [b""] * len(KEYS)
        assert replica.counts["holders_swept"] == 2 * len(KEYS)
    finally:
        await backend.close()
