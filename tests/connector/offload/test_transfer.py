"""Copies between paged tensors and host slots: right bytes, right places, and never two steps on one buffer."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.connector.offload import lanes
from kvatlas.connector.offload.engine import EngineSettings, OffloadEngine, TransferItem, host_memory
from kvatlas.connector.offload.lanes import BUFFERS, CpuLane, CudaLane
from kvatlas.connector.offload.transfer import Mover, PagedKV, Placement, Ref

pytestmark = pytest.mark.torch

BLOCKS, SLOTS = 12, 9


def caches(pages: list[list[tuple[int, int]]], device: str = "cpu") -> PagedKV:
    """Return paged tensors of these ``(page bytes, padding)`` per group and layer, with random content."""
    tensors, groups = [], []
    for layers in pages:
        groups.append(tuple(Ref(len(tensors) + number, page) for number, (page, _) in enumerate(layers)))
        tensors += [
            torch.randint(-128, 128, (BLOCKS, page + padding), dtype=torch.int8).to(device) for page, padding in layers
        ]
    return PagedKV(tuple(tensors), tuple(groups))


def content(kv: PagedKV, group: int, block: int) -> bytes:
    return b"".join(kv.tensors[ref.tensor][block, : ref.page_bytes].cpu().numpy().tobytes() for ref in kv.groups[group])


def host_for(kv: PagedKV) -> torch.Tensor:
    device = kv.tensors[0].device if kv.tensors[0].is_cuda else None
    return host_memory(SLOTS, kv.slot_bytes, pin_for=device)[0]


_PAGES = st.tuples(st.one_of(st.integers(1, 40), st.integers(1, 600).map(lambda n: 8 * n)), st.sampled_from([0, 3, 64]))


@given(
    pages=st.lists(st.lists(_PAGES, min_size=1, max_size=3), min_size=1, max_size=3),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None)
def test_any_geometry_comes_back_into_other_blocks(pages: list[list[tuple[int, int]]], chunk: int, seed: int) -> None:
    """Whatever pages, padding, chunks and slots: each slot holds its block, and nothing else is touched."""
    rng = random.Random(seed)
    kv = caches(pages)
    host = host_for(kv)
    mover = Mover(kv, host, chunk)
    for group in range(len(pages)):
        count = rng.randint(0, SLOTS)
        slots = rng.sample(range(SLOTS), count)
        sources, targets = rng.sample(range(BLOCKS), count), rng.sample(range(BLOCKS), count)
        wanted = [content(kv, group, block) for block in sources]
        before = host.clone()
        mover.store(group, [Placement(block, slot) for block, slot in zip(sources, slots, strict=True)], mover.mark())
        size = kv.block_bytes(group)
        assert [host[slot, :size].numpy().tobytes() for slot in slots] == wanted
        others = sorted(set(range(SLOTS)) - set(slots))
        assert torch.equal(host[others], before[others])

        expected = [tensor.clone() for tensor in kv.tensors]
        for block, data in zip(targets, wanted, strict=True):
            at = 0
            for ref in kv.groups[group]:
                part = torch.frombuffer(bytearray(data[at : at + ref.page_bytes]), dtype=torch.int8)
                expected[ref.tensor][block, : ref.page_bytes] = part
                at += ref.page_bytes
        mover.load(group, [Placement(block, slot) for block, slot in zip(targets, slots, strict=True)], mover.mark())
        assert all(torch.equal(one, two) for one, two in zip(kv.tensors, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_gpu_moves_the_same_bytes(chunk: int) -> None:
    """Groups of every kind of page, in more chunks than there are buffers, come back byte for byte."""
    kv = caches([[(4096, 0)], [(4096, 64), (24, 0)], [(7, 0), (13, 3)]], "cuda")
    mover = Mover(kv, host_for(kv), chunk)
    for group in range(3):
        wanted = [content(kv, group, block) for block in range(SLOTS)]
        slots = random.Random(chunk).sample(range(SLOTS), SLOTS)
        mover.store(group, [Placement(block, slot) for block, slot in enumerate(slots)], mover.mark())
        for ref in kv.groups[group]:
            kv.tensors[ref.tensor].zero_()
        mover.load(group, [Placement(block + 3, slot) for block, slot in enumerate(slots)], mover.mark())
        assert [content(kv, group, block + 3) for block in range(SLOTS)] == wanted


@pytest.mark.parametrize("size", [1, 2560, 3583, 3584, 4096])
def test_copies_to_host_memory_have_no_holes(size: int) -> None:
    """A copy with holes would pass through pageable memory on a GPU, so none is asked for, and no byte is left out."""
    kv = caches([[(size, 0)], [(4096, 0)]])
    mover = Mover(kv, host_for(kv), 6)
    slots = [0, 1, 2, 5, 7, 8]
    buffer = torch.zeros((6, kv.slot_bytes), dtype=torch.int8)
    for near, far in mover._pairs(buffer, 0, slots):
        assert near.is_contiguous()
        assert far.is_contiguous()
        far.fill_(1)
        near.fill_(1)
    assert bool((mover.host[slots, :size] == 1).all())
    assert bool((buffer[:, :size] == 1).all())
    assert not bool(mover.host[[3, 4, 6]].any())


def test_pages_are_moved_as_wide_integers_where_they_allow_it() -> None:
    """Eight bytes per thread of an index kernel instead of one, unless a page's place or size forbids it."""
    kv = caches([[(4096, 0), (64, 8), (12, 0), (8, 0)]])
    kinds = [part.pages.dtype for part in Mover(kv, host_for(kv))._groups[0]]
    assert kinds == [torch.int64, torch.int64, torch.int8, torch.int8]


def test_caches_made_in_inference_mode_can_be_loaded() -> None:
    """Engines make their caches in inference mode, where alone such tensors may be written to."""
    with torch.inference_mode():
        kv = caches([[(64, 0)]])
    wanted = content(kv, 0, 1)
    mover = Mover(kv, host_for(kv))
    mover.store(0, [Placement(1, 0)])
    mover.load(0, [Placement(5, 0)])
    assert content(kv, 0, 5) == wanted


def test_a_transfer_that_fails_has_ended_on_the_device() -> None:
    """An error in the middle is raised only after what was begun is done: its slots go to somebody else then."""
    kv = caches([[(64, 0)]])
    ended: list[bool] = []

    class Watched(CpuLane):
        def finish(self) -> None:
            ended.append(True)

    mover = Mover(kv, host_for(kv), 1)
    mover._local.store = Watched((1, kv.slot_bytes))
    with pytest.raises(IndexError):
        mover.store(0, [Placement(1, 0), Placement(99, 1)])
    assert ended == [True]


@pytest.mark.parametrize(("group", "block"), [(0, BLOCKS), (0, -1), (1, 0), (-1, 0)])
def test_a_block_that_is_not_there_is_refused_at_once(group: int, block: int) -> None:
    """Wrong numbers never reach an index kernel, and no transfer of that call begins."""
    engine = OffloadEngine(caches([[(64, 0)]]), EngineSettings(host_bytes=4096))
    for move in (engine.store, engine.load):
        with pytest.raises(ValueError, match="no block"):
            move([TransferItem(b"good", 0, 0), TransferItem(b"bad", group, block)])
    assert engine.lookup([b"good"]) == {b"good": None}
    engine.close()


def resident_bytes() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_host_memory_lies_where_its_cpus_are() -> None:
    """With CPUs named every page is touched on them at the start, and the calling thread stays free."""
    allowed = os.sched_getaffinity(0)
    before = resident_bytes()
    tensor, _ = host_memory(64, 1 << 20, cpus=(min(allowed),))
    assert resident_bytes() - before > 60 << 20
    assert os.sched_getaffinity(0) == allowed
    assert tensor.shape == (64, 1 << 20)


# -- the order of steps on a GPU, without one ------------------------------------------------------------------


class Timeline:
    """A stream: which steps are certain to have ended before its next one begins."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.ended: set[int] = set()

    def wait_event(self, event: Moment) -> None:
        self.ended |= event.ended


class Moment:
    """An event: the steps that its stream had been given when it was recorded."""

    waited: ClassVar[set[int]] = set()

    def __init__(self, blocking: bool = False) -> None:
        self.ended: set[int] = set()

    def record(self, stream: Timeline) -> None:
        self.ended = set(stream.ended)

    def synchronize(self) -> None:
        Moment.waited |= self.ended


@pytest.mark.parametrize("loading", [False, True])
def test_no_two_steps_of_a_gpu_transfer_use_a_buffer_at_once(monkeypatch: pytest.MonkeyPatch, loading: bool) -> None:
    """Every step waits for the last one on its buffer but not for the other buffer's, and the end waits for all."""
    current: list[Timeline] = []

    @contextlib.contextmanager
    def on(stream: Timeline) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(lanes.torch.cuda, "Stream", Timeline)
    monkeypatch.setattr(lanes.torch.cuda, "Event", Moment)
    monkeypatch.setattr(lanes.torch.cuda, "stream", on)
    monkeypatch.setattr(lanes.torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Moment, "waited", set())
    lane: Any = CudaLane(torch.device("cpu"), (1, 8), urgent=loading)
    assert lane._kernels.priority == (-1 if loading else 0)
    last: dict[int, int] = {}
    step = 0
    for _ in range(2):  # a second transfer on the same lane
        free = 0
        for chunk in range(5):
            for enter in (lane.copies, lane.kernels) if loading else (lane.kernels, lane.copies):
                with enter(chunk) as buffer:
                    stream = current[-1]
                    number = next(n for n, one in enumerate(lane._buffers) if one is buffer)
                    assert number == chunk % BUFFERS
                    assert last.get(number, 0) in {*stream.ended, 0}, "a buffer is used by two steps at once"
                    free += last.get(1 - number, 0) not in stream.ended
                    step += 1
                    stream.ended.add(step)
                last[number] = step
        assert free, "chunks do not overlap"
        lane.finish()
        assert set(range(1, step + 1)) <= Moment.waited
