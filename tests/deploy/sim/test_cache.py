"""The paged cache against a naive model that compares token prefixes instead of hashes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvatlas.deploy.sim.cache import (
    CPU,
    ClearedCache,
    Hasher,
    PagedCache,
    RemovedBlock,
    Request,
    Running,
    StoredBlocks,
)
from kvatlas.deploy.sim.errors import PoolFullError, SimError

SIZE = 4

Identity = tuple[str | None, tuple[int, ...]]


def request(*tokens: int, output: tuple[int, ...] = (), salt: str | None = None, lora: str | None = None) -> Request:
    return Request(tokens=list(tokens), output=list(output), cache_salt=salt, lora=lora)


def run(cache: PagedCache, one: Request) -> Running:
    running = cache.start(one)
    cache.finish(running)
    return running


class NaiveCache:
    """Lists and whole prefixes: slow, and too simple to be wrong in the same way."""

    def __init__(self, blocks: int) -> None:
        self.free = list(range(blocks))
        self.contents: dict[int, Identity] = {}
        self.users: Counter[int] = Counter()
        self.order: list[int] = []  # slots in the order in which they got their contents

    def hit(self, tokens: list[int], salt: str | None) -> list[int]:
        slots = []
        for end in range(SIZE, len(tokens), SIZE):  # the last token never counts
            found = [slot for slot in self.order if self.contents.get(slot) == (salt, tuple(tokens[:end]))]
            if not found:
                break
            slots.append(found[0])
        return slots

    def allocate(self, count: int) -> list[int]:
        slots = [self.free.pop(0) for _ in range(count)]
        for slot in slots:
            if self.contents.pop(slot, None) is not None:
                self.order.remove(slot)
            self.users[slot] += 1
        return slots

    def start(self, tokens: list[int], salt: str | None) -> list[int] | None:
        slots = self.hit(tokens, salt)
        wanted = -(-len(tokens) // SIZE) - len(slots)
        if wanted > len([slot for slot in self.free if slot not in slots]):
            return None
        for slot in slots:
            if slot in self.free:
                self.free.remove(slot)
            self.users[slot] += 1
        slots = slots + self.allocate(wanted)
        self.fill(slots, tokens, salt)
        return slots

    def extend(self, slots: list[int], tokens: list[int], salt: str | None) -> bool:
        wanted = -(-len(tokens) // SIZE) - len(slots)
        if wanted > len(self.free):
            return False
        slots += self.allocate(wanted)
        self.fill(slots, tokens, salt)
        return True

    def fill(self, slots: list[int], tokens: list[int], salt: str | None) -> None:
        for number in range(len(tokens) // SIZE):
            if slots[number] not in self.contents:
                self.contents[slots[number]] = (salt, tuple(tokens[: (number + 1) * SIZE]))
                self.order.append(slots[number])

    def finish(self, slots: list[int]) -> None:
        front = []
        for slot in reversed(slots):
            self.users[slot] -= 1
            if self.users[slot] == 0:
                if slot in self.contents:
                    self.free.append(slot)
                else:
                    front.append(slot)
        self.free = front + self.free


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=18)
SALTS = st.sampled_from([None, None, "s"])


class CacheMachine(RuleBasedStateMachine):
    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedCache(blocks=9, block_size_tokens=SIZE, seed=7)
        self.naive = NaiveCache(9)
        self.announced: Counter[int] = Counter()
        self.identity: dict[int, Identity] = {}

    @rule(target=running, tokens=TOKENS, salt=SALTS)
    def start(self, tokens: list[int], salt: str | None) -> tuple[Running, list[int]] | None:
        expected = self.naive.start(list(tokens), salt)
        try:
            got = self.cache.start(request(*tokens, salt=salt))
        except PoolFullError:
            assert expected is None
            return None
        assert expected == got.slots
        return got, expected

    @rule(pair=running, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def extend(self, pair: tuple[Running, list[int]] | None, tokens: list[int]) -> None:
        if pair is None or not pair[0].slots:
            return
        got, slots = pair
        fits = self.naive.extend(slots, got.tokens + tokens, got.request.cache_salt)
        try:
            self.cache.extend(got, tokens)
        except PoolFullError:
            assert not fits
            return
        assert fits
        assert got.slots == slots

    @rule(pair=consumes(running))
    def finish(self, pair: tuple[Running, list[int]] | None) -> None:
        if pair is not None:
            self.cache.finish(pair[0])
            self.naive.finish(pair[1])

    @rule()
    def clear(self) -> None:
        done = self.cache.clear()
        assert done == (len(self.naive.free) == 9)
        if done:
            self.naive.contents.clear()
            self.naive.order.clear()

    @rule(tokens=TOKENS, salt=SALTS)
    def ask(self, tokens: list[int], salt: str | None) -> None:
        keys, tiers = self.cache.match(tokens, cache_salt=salt)
        assert len(keys) == len(self.naive.hit(tokens, salt))
        assert tiers == ["gpu"] * len(keys)

    @invariant()
    def the_events_tell_what_is_held(self) -> None:
        for event in self.cache.take_events():
            if isinstance(event, StoredBlocks):
                self.announced.update(event.keys)
                start: Identity = (None, ()) if event.parent is None else self.identity[event.parent]
                for number, key in enumerate(event.keys):
                    salt = start[0] or ((event.extra[0] or [None])[-1] if event.parent is None else None)
                    prefix = (*start[1], *event.tokens[: (number + 1) * SIZE])
                    assert self.identity.setdefault(key, (salt, prefix)) == (salt, prefix)
            elif isinstance(event, RemovedBlock):
                self.announced[event.key] -= 1
            else:
                self.announced.clear()
        held = {self.identity[key]: count for key, count in self.announced.items() if count}
        assert held == Counter(self.naive.contents.values())
        assert {key: tiers["gpu"] for key, tiers in self.cache.held().items()} == {
            key: count for key, count in self.announced.items() if count
        }


TestCache = CacheMachine.TestCase
TestCache.settings = hypothesis_settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_prompt_of_whole_blocks_hits_all_but_its_last() -> None:
    """The last token is computed again, so the block that holds it is stored as a second copy."""
    cache = PagedCache(blocks=10, block_size_tokens=SIZE, seed=1)
    prompt = request(*range(8))
    run(cache, prompt)
    cache.take_events()
    second = run(cache, prompt)
    assert second.hit_blocks == 1
    (event,) = cache.take_events()
    assert isinstance(event, StoredBlocks)
    assert event.keys == second.keys[1:]
    assert event.parent == second.keys[0]
    assert cache.held()[second.keys[1]] == {"gpu": 2}


def test_the_tail_of_a_prompt_is_evicted_first() -> None:
    """A finished request gives its last block back first, so that is the first to go."""
    cache = PagedCache(blocks=4, block_size_tokens=SIZE, seed=1)
    first = run(cache, request(*range(16)))
    cache.take_events()
    run(cache, request(*range(100, 108)))
    removed = [event.key for event in cache.take_events() if isinstance(event, RemovedBlock)]
    assert removed == [first.keys[3], first.keys[2]]


def test_blocks_without_contents_are_reused_before_cached_ones() -> None:
    """A partial block holds nothing worth keeping: the next request takes its slot and evicts nothing."""
    cache = PagedCache(blocks=3, block_size_tokens=SIZE, seed=1)
    run(cache, request(*range(8)))
    run(cache, request(50, 51))
    run(cache, request(60, 61))
    assert not [event for event in cache.take_events() if isinstance(event, RemovedBlock)]


def test_a_running_request_is_never_evicted() -> None:
    """Blocks in use are not free: a request that needs them waits."""
    cache = PagedCache(blocks=4, block_size_tokens=SIZE, seed=1)
    running = cache.start(request(*range(12)))
    with pytest.raises(PoolFullError):
        cache.start(request(*range(100, 108)))
    assert cache.clear() is False
    cache.finish(running)
    cache.start(request(*range(100, 108)))


def test_removals_precede_the_store_that_caused_them() -> None:
    """Eviction happens when slots are handed out, before their new contents are announced."""
    cache = PagedCache(blocks=2, block_size_tokens=SIZE, seed=1)
    run(cache, request(*range(8)))
    cache.take_events()
    run(cache, request(*range(50, 58)))
    assert [type(event) for event in cache.take_events()] == [RemovedBlock, RemovedBlock, StoredBlocks]


def test_salt_and_adapter_keep_prompts_apart() -> None:
    """Equal tokens under another cache salt or LoRA do not hit."""
    cache = PagedCache(blocks=20, block_size_tokens=SIZE, seed=1)
    tokens = tuple(range(9))
    run(cache, request(*tokens, salt="a", lora="x"))
    assert len(cache.match(tokens, cache_salt="a", lora="x")[0]) == 2
    for salt, lora in ((None, None), ("a", None), (None, "x"), ("b", "x")):
        assert cache.match(tokens, cache_salt=salt, lora=lora) == ([], [])


def test_pods_with_other_seeds_share_no_engine_key() -> None:
    """Each pod names blocks with its own seed, as engines with random hash seeds do."""
    tokens = list(range(64))
    assert not set(Hasher(1, SIZE).chain(tokens)) & set(Hasher(2, SIZE).chain(tokens))
    assert all(0 <= key < 1 << 64 for key in Hasher(1, SIZE).chain(tokens))


def test_the_cpu_tier_keeps_what_the_gpu_evicts() -> None:
    """Every stored block is copied to the CPU tier with a placeholder event and is still a hit after eviction."""
    cache = PagedCache(blocks=2, block_size_tokens=SIZE, seed=1, cpu_blocks=3)
    first = run(cache, request(*range(8)))
    gpu, cpu = cache.take_events()
    assert isinstance(cpu, StoredBlocks)
    assert isinstance(gpu, StoredBlocks)
    assert (cpu.keys, cpu.medium, cpu.tokens, cpu.parent) == (gpu.keys, CPU, [], None)
    run(cache, request(*range(50, 54)))
    assert cache.match([*range(8), 1])[1] == ["gpu", "cpu"]
    run(cache, request(*range(60, 64)))
    gone = [event for event in cache.take_events() if isinstance(event, RemovedBlock) and event.medium == CPU]
    assert [event.key for event in gone] == [first.keys[0]]


def test_a_clear_drops_the_gpu_alone() -> None:
    """After a clear the second tier still hits, and one event says what happened."""
    cache = PagedCache(blocks=4, block_size_tokens=SIZE, seed=1, cpu_blocks=4)
    run(cache, request(*range(8)))
    cache.take_events()
    assert cache.clear()
    assert cache.take_events() == [ClearedCache()]
    assert cache.match([*range(8), 1])[1] == ["cpu", "cpu"]


def test_the_second_tier_counts_from_where_the_gpu_ends() -> None:
    """A block that is on the GPU again behind one that is not there is taken from the second tier."""
    cache = PagedCache(blocks=4, block_size_tokens=SIZE, seed=1, cpu_blocks=2)
    first = run(cache, request(*range(8)))
    cache._slots_of.pop(first.keys[0])
    assert cache.match([*range(8), 1])[1] == ["cpu", "cpu"]
    del cache._cpu[first.keys[1]]
    assert cache.match([*range(8), 1])[1] == ["cpu"]


@pytest.mark.parametrize(("blocks", "size", "cpu"), [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_an_impossible_cache_is_refused(blocks: int, size: int, cpu: int) -> None:
    """A cache needs at least one block of one token."""
    with pytest.raises(SimError):
        PagedCache(blocks=blocks, block_size_tokens=size, seed=1, cpu_blocks=cpu)
