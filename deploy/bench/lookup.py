"""``kvatlas bench lookup``: a lookup of cached keys in local partitions, idle and while all of them commit."""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.block_key import KEY_BYTES, block_keys, pack_tokens, partition_of, root_key
from kvatlas.deploy.bench._figures import figure
from kvatlas.scorer.lookups.local import LocalTables, TableLookups
from kvatlas.streams.serving.lookup_service import LookupService
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState, Role
from kvatlas.streams.v1 import block_index_pb2 as pb

HELP: Final = "a lookup of 1,024 cached keys in local partitions: idle, and while everything is being committed"

_PARTITIONS: Final = 8
_HOLDER_BYTES: Final = 24
#: Changes of a partition on their way to the changelog, and as many that gather on top of them: a full flush over
#: eight partitions.
_CHANGES: Final = 1_000

Lookup = Callable[[Sequence[bytes]], Awaitable[Sequence[bytes | None]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--keys", type=int, default=1_024, help="keys of a lookup (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="lookups of each case and turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each case; the best counts (%(default)s)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures: in the scorer's own process, and in a worker that is asked (without gRPC itself).

    Raises:
        KvatlasError: an answer is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="kvatlas-bench-") as name:
        states = _partitions(Path(name))
        try:
            yield from asyncio.run(_cases(states, args))
        finally:
            for state in states.values():
                state.close()


def _partitions(folder: Path) -> dict[int, PartitionState]:
    budget = RocksBudget(8 << 20, 32 << 20)
    states = {
        number: PartitionState(number, folder / f"{number}.db", budget, 32 << 20) for number in range(_PARTITIONS)
    }
    for state in states.values():
        state.role = Role.ACTIVE
    return states


async def _cases(states: Mapping[int, PartitionState], args: argparse.Namespace) -> list[dict[str, Any]]:
    keys = block_keys(root_key("bench"), pack_tokens(list(range(args.keys * 16))), 16)
    values = {key: bytes([number // 64 % 256]) * _HOLDER_BYTES for number, key in enumerate(keys)}
    _commit(states, values)
    lookups = {"": _in_process(states), "worker, ": _in_worker(states)}
    idle: dict[str, float] = {}
    for prefix, lookup in lookups.items():
        idle[prefix] = await _best(lookup, keys, values, args)
    newer = _load(states, keys)
    made = []
    for prefix, lookup in lookups.items():
        loaded = await _best(lookup, keys, {**values, **newer}, args)
        made.append(figure(f"{prefix}idle", idle[prefix], "us"))
        made.append(figure(f"{prefix}loaded", loaded, "us", baseline=idle[prefix], ratio=loaded / idle[prefix]))
    return made


def _commit(states: Mapping[int, PartitionState], values: Mapping[bytes, bytes]) -> None:
    parts: dict[int, dict[bytes, bytes | None]] = {number: {} for number in states}
    for key, value in values.items():
        parts[partition_of(key, len(states))][key] = value
    for number, state in states.items():
        state.write(parts[number], 1, Meta(1, time.time_ns(), time.time_ns()))


def _load(states: Mapping[int, PartitionState], keys: Sequence[bytes]) -> dict[bytes, bytes]:
    """Have every partition commit changes and apply more; an eighth of ``keys`` is among them.

    Returns:
        The new values of those.
    """
    chance = random.Random(7)  # noqa: S311 # the same load every time
    newer = dict.fromkeys(keys[::8], b"\xff" * _HOLDER_BYTES)
    for part in (keys[::16], keys[8::16]):
        for state in states.values():
            for _ in range(_CHANGES):
                state.overlay.put(chance.randbytes(16), bytes(_HOLDER_BYTES))
        for key in part:
            states[partition_of(key, len(states))].overlay.put(key, newer[key])
        for state in states.values():
            state.overlay.advance(2, time.time_ns())
            if part[0] == keys[0]:
                state.overlay.cut()
    return newer


def _in_process(states: Mapping[int, PartitionState]) -> Lookup:
    tables = TableLookups(LocalTables(states.get, lambda: len(states), lambda: "bench", "v1"))

    async def lookup(keys: Sequence[bytes]) -> Sequence[bytes | None]:
        return (await tables.lookup(keys, time.monotonic() + 60)).values

    return lookup


def _in_worker(states: Mapping[int, PartitionState]) -> Lookup:
    patient = SimpleNamespace(time_remaining=lambda: None)  # a caller without a deadline
    service = LookupService(
        "bench",
        partition_count=len(states),
        max_keys=1 << 20,
        state_of=states.get,
        lag_of=lambda _: 0,
        others=cast("Any", None),
        certain=lambda: True,
    )

    async def lookup(keys: Sequence[bytes]) -> Sequence[bytes | None]:
        answer = await service.Lookup(pb.LookupRequest(keys=b"".join(keys), partition_count=len(states)), patient)
        distinct = [b"", *answer.values]
        return [distinct[number] for number in memoryview(answer.index).cast("I")]

    return lookup


async def _best(
    lookup: Lookup, keys: Sequence[bytes], expected: Mapping[bytes, bytes], args: argparse.Namespace
) -> float:
    """Return the microseconds of one lookup in the best turn."""
    if await lookup(keys) != [expected[key] for key in keys]:
        raise KvatlasError("a lookup did not give what was applied")
    best, packed = float("inf"), b"".join(keys)
    for _ in range(args.turns):
        prompts = [_fresh(packed) for _ in range(args.rounds)]
        began = time.process_time()
        for prompt in prompts:
            await lookup(prompt)
        best = min(best, (time.process_time() - began) / args.rounds * 1e6)
    return best


def _fresh(packed: bytes) -> list[bytes]:
    """Return keys that nobody has hashed yet, as every request brings them."""
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]
