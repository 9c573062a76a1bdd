"""Every backend beside a plain dict model, under random updates, repetitions, dropped epochs and restarts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvatlas.bridge.model import epochs
from kvatlas.bridge.model.events import Tier
from kvatlas.scorer.library.backends import Backend, MemoryBackend
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord
from kvatlas.streams.index.holders import pack_holder

from .test_conformance import key, record

PODS, KEYS = 3, 6
TIERS = (Tier.GPU, Tier.CPU)
_numbers = itertools.count()

updates = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, KEYS - 1),
        st.sampled_from(TIERS),
        st.integers(0, 1),  # group
        st.integers(0, 2),  # clears
    ),
    max_size=8,
)


class Model:
    """What an index is: (pod, group, tier) -> epoch for every key, and how far each pod's stream was applied."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[tuple[int, int, int], int]] = {number: {} for number in range(KEYS)}
        self.positions: dict[int, tuple[int, int]] = {}

    def apply(self, pod: int, at: tuple[int, int], changes: Sequence[Any]) -> None:
        if self.positions.get(pod, (-1, -1)) >= at:
            return
        self.positions[pod] = at
        for add, number, tier, group, clears in changes:
            holders, who = self.entries[number], (pod, group, int(tier))
            epoch = epochs.epoch_of(at[0], clears)
            if holders.get(who, -1) > epoch:
                continue
            if add:
                holders[who] = epoch
            else:
                holders.pop(who, None)

    def drop(self, pod: int, valid_from: int, gpu_valid_from: int) -> int:
        dead = [
            (holders, who)
            for holders in self.entries.values()
            for who, epoch in holders.items()
            if who[0] == pod and (epoch < valid_from or (who[2] == Tier.GPU and epoch < gpu_valid_from))
        ]
        for holders, who in dead:
            del holders[who]
        return len(dead)

    def values(self) -> list[bytes]:
        return [
            b"".join(sorted(pack_holder(pod, group, tier, 0, 0, epoch) for (pod, group, tier), epoch in found.items()))
            for found in self.entries.values()
        ]


@pytest.mark.parametrize("kind", ["memory", "memory-bytes", "rocksdb", "redis", "valkey"])
def test_a_backend_is_a_dict(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Whatever happens in whatever order, lookups are the model's; a lasting backend has all of it when reopened."""
    server = request.getfixturevalue(f"{kind}_server") if kind in ("redis", "valkey") else None
    folder = tmp_path_factory.mktemp("stateful")
    lasting = kind not in ("memory", "memory-bytes")

    def make(number: int) -> Backend:
        if kind == "memory":
            return MemoryBackend()
        if kind == "memory-bytes":
            return MemoryBackend(None, max_bytes=64 * 1024 * 1024)
        if kind == "rocksdb":
            return RocksBackend(folder / "index", cache_bytes=4 * 1024 * 1024)
        return RedisBackend(server.url, prefix=f"stateful-{number}")

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.runner = asyncio.Runner()
            self.number, self.model = next(_numbers), Model()
            self.log: list[tuple[int, tuple[int, int], Any, BlocksRecord]] = []
            self.sequences = dict.fromkeys(range(PODS), (5, 0))
            self.open()
            if isinstance(self.backend, RocksBackend):
                self.backend.table.clear()  # one database for all examples: to make one takes longer than an example

        def open(self) -> None:
            self.backend = make(self.number)
            self.runner.run(self.backend.start())

        def put(self, pod: int, at: tuple[int, int], changes: Any, made: BlocksRecord) -> None:
            self.runner.run(self.backend.apply(made))
            self.model.apply(pod, at, changes)

        @rule(pod=st.integers(0, PODS - 1), changes=updates, restarted=st.sampled_from([False] * 5 + [True]))
        def update(self, pod: int, changes: Any, restarted: bool) -> None:
            incarnation, sequence = self.sequences[pod]
            at = (incarnation + 1, 0) if restarted else (incarnation, sequence + 1)
            self.sequences[pod] = at
            packed = [
                (
                    OP_ADD if add else OP_REMOVE,
                    key(number),
                    pack_holder(pod, group, tier, 0, 0, epochs.epoch_of(at[0], clears)),
                )
                for add, number, tier, group, clears in changes
            ]
            made = record(pod, at[1], packed, epochs.epoch_of(at[0], 0))
            self.log.append((pod, at, changes, made))
            self.put(*self.log[-1])

        @rule(data=st.data())
        def repeat(self, data: st.DataObject) -> None:
            if self.log:
                self.put(*data.draw(st.sampled_from(self.log[-10:])))

        @rule(pod=st.integers(0, PODS - 1), clears=st.integers(0, 3), gpu=st.booleans())
        def drop(self, pod: int, clears: int, gpu: bool) -> None:
            epoch = epochs.epoch_of(self.sequences[pod][0], clears)
            bounds = (0, epoch) if gpu else (epoch, 0)
            assert self.runner.run(self.backend.drop_epoch(pod, *bounds)) == self.model.drop(pod, *bounds)

        @rule()
        def restart(self) -> None:
            self.runner.run(self.backend.close())
            if not lasting:
                self.model = Model()
            self.open()

        @invariant()
        def the_same(self) -> None:
            if hasattr(self, "backend"):
                keys = [key(number) for number in range(KEYS)]
                assert list(self.runner.run(self.backend.lookup(keys))) == self.model.values()

        def teardown(self) -> None:
            if hasattr(self, "backend"):
                self.runner.run(self.backend.close())
                self.runner.close()

    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    examples = 12 if kind == "rocksdb" else 30
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=checks, derandomize=True
        ),
    )
