"""The core: paged tensors to host memory to files and back, on the CPU and on a GPU where there is one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvatlas.connector.errors import CapacityError
from kvatlas.connector.offload.engine import EngineSettings, OffloadEngine, TransferItem
from kvatlas.connector.offload.transfer import PagedKV
from kvatlas.connector.outcome import OffloadTier, Outcome
from tests.connector.conftest import ENOSPC, Fleet, fail, key

pytestmark = pytest.mark.torch

WAIT = 60


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the paged tensors are."""
    return request.param


def paged(device: str, seed: int, blocks: int = 40) -> PagedKV:
    """Two groups: two bfloat16 layers with keys and values stacked, and one float32 layer."""
    torch.manual_seed(seed)
    first = [torch.randn(2, blocks, 16, 4, 8, device=device).to(torch.bfloat16) for _ in range(2)]
    one = PagedKV.from_layers([first], block_dim=1)
    second = torch.randn(blocks, 16, 40, device=device)
    flat = second.view(blocks, -1).view(torch.int8)
    ref = type(one.groups[0][0])(len(one.tensors), flat.shape[1])
    return PagedKV((*one.tensors, flat), (*one.groups, (ref,)))


def block_of(kv: PagedKV, item: TransferItem) -> bytes:
    return b"".join(
        kv.tensors[ref.tensor][item.block, : ref.page_bytes].cpu().numpy().tobytes() for ref in kv.groups[item.group]
    )


def items(numbers: range, offset: int = 0) -> list[TransferItem]:
    return [TransferItem(key(number, number % 2), number % 2, (number + offset) % 40) for number in numbers]


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("slots", [2, 9, 64])
def test_round_trip_through_every_tier(fleet: Fleet, device: str, policy: str, slots: int) -> None:
    """Blocks of all groups come back byte-equal into other places, from host memory or from files."""
    source = paged(device, 1)
    files = fleet.tier(blocks_per_file=2)
    settings = EngineSettings(host_bytes=slots * source.slot_bytes, policy=policy, chunk_blocks=4)
    engine = OffloadEngine(source, settings, files)
    stored = items(range(40))
    wanted = {item.key: block_of(source, item) for item in stored}
    done: dict[bytes, Outcome] = {}
    for item in stored:
        done[item.key] = engine.store([item]).result(WAIT)[item.key].outcome
    assert set(done.values()) == {Outcome.STORED}
    for tensor in source.tensors:
        tensor.zero_()
    moved = items(range(40), offset=7)
    results = engine.load(moved).result(WAIT)
    assert {result.outcome for result in results.values()} == {Outcome.LOADED}
    assert all(block_of(source, item) == wanted[item.key] for item in moved)
    assert {result.tier for result in results.values()} >= ({OffloadTier.FILE} if slots < 40 else {OffloadTier.HOST})
    engine.close()


def test_a_full_host_tier_sheds_and_says_so(fleet: Fleet, device: str) -> None:
    """What every result says about a block is what a later load finds."""
    source = paged(device, 2)
    files = fleet.tier(threads=1)
    engine = OffloadEngine(source, EngineSettings(host_bytes=4 * source.slot_bytes, chunk_blocks=2), files)
    stored = items(range(40))
    wanted = {item.key: block_of(source, item) for item in stored}
    results = engine.store(stored).result(WAIT)
    for tensor in source.tensors:
        tensor.zero_()
    back = engine.load(stored).result(WAIT)
    for item in stored:
        assert results[item.key].outcome in {Outcome.STORED, Outcome.SHED}
        assert back[item.key].ok == results[item.key].ok
        assert block_of(source, item) == (wanted[item.key] if back[item.key].ok else bytes(len(wanted[item.key])))
    engine.close()


def test_a_failed_file_store_is_a_failure_that_host_memory_survives(fleet: Fleet, device: str) -> None:
    """When the files refuse, the store is FAILED with the host as the farthest tier, and a load still works."""
    source = paged(device, 3)
    engine = OffloadEngine(source, EngineSettings(host_bytes=8 * source.slot_bytes), fleet.tier())
    fleet.fs.faults["pwritev"] = fail(ENOSPC)
    item = items(range(1))[0]
    result = engine.store([item]).result(WAIT)[item.key]
    assert (result.outcome, result.tier) == (Outcome.FAILED, OffloadTier.HOST)
    assert engine.lookup([item.key]) == {item.key: OffloadTier.HOST}
    assert engine.load([item]).result(WAIT)[item.key].ok
    assert fleet.announced() == set()
    engine.close()


def test_a_block_that_is_not_loaded_is_not_touched(fleet: Fleet, device: str) -> None:
    """A corrupt file is a miss and leaves the paged block as it was."""
    source = paged(device, 4)
    files = fleet.tier()
    engine = OffloadEngine(source, EngineSettings(host_bytes=source.slot_bytes), files)
    first, second = items(range(2))
    engine.store([first]).result(WAIT)
    engine.store([second]).result(WAIT)
    path = Path(files._segments.path(first.key))
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)
    before = block_of(source, first)
    assert engine.load([first]).result(WAIT)[first.key].outcome is Outcome.MISS
    assert block_of(source, first) == before
    assert engine.evict([second.key])[second.key].outcome is Outcome.MISS
    assert engine.lookup([first.key, second.key]) == {first.key: None, second.key: None}
    engine.close()


def test_many_transfers_at_once_never_give_wrong_bytes(fleet: Fleet, device: str) -> None:
    """Random stores and loads in flight together: whatever is LOADED is right."""
    source = paged(device, 5)
    truth = {item.key: block_of(source, item) for item in items(range(40))}
    into = paged(device, 6)
    both = PagedKV(tuple(torch.cat([a, b]) for a, b in zip(source.tensors, into.tensors, strict=True)), source.groups)
    engine = OffloadEngine(both, EngineSettings(host_bytes=12 * both.slot_bytes, chunk_blocks=3), fleet.tier())
    rng = random.Random(7)
    for _ in range(30):
        engine.store(rng.sample(items(range(40)), 6))
        chosen = [item._replace(block=item.block + 40) for item in rng.sample(items(range(40)), 8)]
        for item, result in zip(chosen, (engine.load(chosen).result(WAIT)[item.key] for item in chosen), strict=True):
            if result.ok:
                assert block_of(both, item) == truth[item.key]
    engine.drain(WAIT)
    engine.close()


def test_a_budget_below_one_block_is_an_error(device: str) -> None:
    """Host memory that holds no block is refused at the start."""
    with pytest.raises(CapacityError, match="holds no block"):
        OffloadEngine(paged(device, 1), EngineSettings(host_bytes=100))


def test_host_memory_alone_is_a_tier(device: str) -> None:
    """Without files, what was evicted is a miss and the rest comes back."""
    source = paged(device, 8)
    engine = OffloadEngine(source, EngineSettings(host_bytes=4 * source.slot_bytes))
    for item in items(range(6)):
        assert engine.store([item]).result(WAIT)[item.key].outcome is Outcome.STORED
    back = engine.load(items(range(6))).result(WAIT)
    assert [back[item.key].ok for item in items(range(6))].count(True) >= 3
    engine.close()


def test_threads_that_move_blocks_stay_on_their_cpus(fleet: Fleet) -> None:
    """The CPUs that the settings name hold for every thread of the core and of the files."""
    cpu = sorted(os.sched_getaffinity(0))[-1]
    seen: list[set[int]] = []
    source = paged("cpu", 9)
    files = fleet.tier(cpus=(cpu,))
    fleet.fs.faults["pwritev"] = lambda *_: seen.append(os.sched_getaffinity(0))
    settings = EngineSettings(host_bytes=8 * source.slot_bytes, cpus=(cpu,))
    engine = OffloadEngine(source, settings, files)
    copy = engine._mover.store
    engine._mover.store = lambda *args: (seen.append(os.sched_getaffinity(0)), copy(*args))[1]  # type: ignore[method-assign]
    assert engine.store(items(range(4))).result(WAIT)
    assert len(seen) >= 5  # 4 files and at least one copy
    assert all(cpus == {cpu} for cpus in seen)
    engine.close()
