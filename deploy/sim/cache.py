"""A paged prefix cache that behaves like vLLM's block pool; pure, one attention group, no I/O, no clock.

Blocks are numbered slots. A slot is *used* while requests refer to it, else it stands in the free queue, where it
keeps its contents until it is handed out again. What makes the behaviour faithful:

1. The free queue is in eviction order. A finished request gives its blocks back from the last to the first, so the
   tail of a prompt is evicted before its head. Blocks without contents worth keeping go to the front instead.
2. Contents are forgotten only when a slot is handed out: that is when a removal is announced.
3. A hit takes the longest run of cached blocks from the first, never the last token of the prompt, because the
   engine must compute that one to sample from it. A block that is recomputed for this reason is a second *copy* of the
   same contents; copies are announced and evicted one by one.
4. A block's name chains from its parent's name and the pod's seed, so two pods never agree on a name.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
import xxhash

from kvatlas.deploy.sim.errors import PoolFullError, SimError

GPU: Final = "GPU"
CPU: Final = "CPU"

_extra_encoder: Final = msgspec.msgpack.Encoder()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks of a pod.

    Attributes:
        tokens: token ids of the prompt.
        output: token ids that the pod will generate (the simulation decides them beforehand).
        cache_salt: keeps its prompts apart from those with another salt.
        lora: adapter name.
        session: conversation it belongs to; requests of one session extend one another.
        at_seconds: when it arrives, from the start of the traffic.
    """

    tokens: list[int]
    output: list[int] = []
    cache_salt: str | None = None
    lora: str | None = None
    session: int = 0
    at_seconds: float = 0.0


class StoredBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of one request became full, chained from ``parent``; ``tokens`` is empty when offloaded."""

    keys: list[int]
    parent: int | None = None
    tokens: list[int] = []
    lora: str | None = None
    extra: list[list[str] | None] = []
    medium: str = GPU


class RemovedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of one block was evicted."""

    key: int
    medium: str = GPU


class ClearedCache(msgspec.Struct, frozen=True):
    """Everything was dropped."""


CacheEvent = StoredBlocks | RemovedBlock | ClearedCache


class Running(msgspec.Struct, kw_only=True, eq=False):
    """A request that holds blocks.

    Attributes:
        tokens: prompt and what was generated so far, as far as it is computed.
        keys: engine keys of its full blocks.
        slots: its blocks' numbers, in order; the last may be partial.
        hit_blocks: leading blocks that were found in the cache (on any tier).
        cached: leading blocks that carry their key in the cache.
    """

    request: Request
    tokens: list[int]
    keys: list[int]
    slots: list[int]
    hit_blocks: int
    cached: int


def extra_of(block: int, cache_salt: str | None, lora: str | None) -> list[str] | None:
    """Return the extra keys of a block as vLLM lists them: LoRA on every block, salt on the first; None for none."""
    extra = ([lora] if lora else []) + ([cache_salt] if cache_salt and block == 0 else [])
    return extra or None


class Hasher:
    """Engine keys: a 64-bit chain over tokens and extra keys that starts at the pod's own seed."""

    def __init__(self, seed: int, block_size_tokens: int) -> None:
        self._seed = seed & 0xFFFFFFFFFFFFFFFF
        self._size = block_size_tokens
        self._root = xxhash.xxh3_64_digest(b"root", seed=self._seed)

    def chain(
        self,
        tokens: Sequence[int],
        *,
        known: Sequence[int] = (),
        cache_salt: str | None = None,
        lora: str | None = None,
    ) -> list[int]:
        """Return the keys of all full blocks of ``tokens``; ``known`` are the leading ones, already computed."""
        keys = list(known)
        parent = keys[-1].to_bytes(8, "big") if keys else self._root
        for number in range(len(keys), len(tokens) // self._size):
            block = array("Q", tokens[number * self._size : (number + 1) * self._size]).tobytes()
            extra = extra_of(number, cache_salt, lora)
            parent = xxhash.xxh3_64_digest(
                parent + block + (_extra_encoder.encode(extra) if extra else b""), seed=self._seed
            )
            keys.append(int.from_bytes(parent, "big"))
        return keys


class PagedCache:
    """The cache of one pod. Not thread-safe: its pod holds a lock.

    Args:
        blocks: slots on the GPU.
        block_size_tokens: tokens in one block.
        seed: of the engine keys.
        cpu_blocks: room of the second tier; every block stored on the GPU is copied there, least recently stored or
            hit leaves first. 0 for none.
    """

    def __init__(self, *, blocks: int, block_size_tokens: int, seed: int, cpu_blocks: int = 0) -> None:
        if blocks < 1 or block_size_tokens < 1 or cpu_blocks < 0:
            raise SimError(f"a cache of {blocks} blocks of {block_size_tokens} tokens (+{cpu_blocks}) cannot exist")
        self.blocks = blocks
        self.block_size_tokens = block_size_tokens
        self.hasher = Hasher(seed, block_size_tokens)
        self._references = [0] * blocks
        self._key_of: list[int | None] = [None] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._slots_of: dict[int, dict[int, None]] = {}
        self._cpu: OrderedDict[int, None] = OrderedDict()
        self._cpu_blocks = cpu_blocks
        self._events: list[CacheEvent] = []

    # --- what is there ------------------------------------------------------------------------------------------

    @property
    def held_blocks(self) -> int:
        """Different blocks that the GPU holds."""
        return len(self._slots_of)

    def holds(self, key: int) -> bool:
        """Whether any tier holds a block."""
        return key in self._slots_of or key in self._cpu

    def held(self) -> dict[int, dict[str, int]]:
        """Return every block that is here: engine key -> tier -> copies."""
        found = {key: {"gpu": len(slots)} for key, slots in self._slots_of.items()}
        for key in self._cpu:
            found.setdefault(key, {})["cpu"] = 1
        return found

    def match(
        self, tokens: Sequence[int], *, cache_salt: str | None = None, lora: str | None = None
    ) -> tuple[list[int], list[str]]:
        """Return how far a prompt would hit: keys of the leading blocks and the tier that each is taken from.

        First what the GPU holds, then from there what the second tier holds, as vLLM looks a prompt up.
        """
        usable = max(len(tokens) - 1, 0) // self.block_size_tokens
        keys: list[int] = []
        tiers: list[str] = []
        chain = self.hasher.chain(tokens[: usable * self.block_size_tokens], cache_salt=cache_salt, lora=lora)
        for key in chain:
            if key in self._slots_of and "cpu" not in tiers[-1:]:
                tiers.append("gpu")
            elif key in self._cpu:
                tiers.append("cpu")
            else:
                break
            keys.append(key)
        return keys, tiers

    # --- life of a request --------------------------------------------------------------------------------------

    def start(self, request: Request) -> Running:
        """Admit a request and compute its prompt.

        Raises:
            PoolFullError: too few free blocks; nothing was changed.
        """
        tokens = list(request.tokens)
        size = self.block_size_tokens
        hit, tiers = self.match(tokens, cache_salt=request.cache_salt, lora=request.lora)
        on_gpu = tiers.index("cpu") if "cpu" in tiers else len(tiers)
        slots = [next(iter(self._slots_of[key])) for key in hit[:on_gpu]]
        wanted = -(-len(tokens) // size) - on_gpu
        resting = sum(1 for slot in slots if self._references[slot] == 0)
        if wanted > len(self._free) - resting:
            raise PoolFullError(f"{wanted} blocks wanted, {len(self._free) - resting} of {self.blocks} free")
        for slot in slots:
            self._free.pop(slot, None)
            self._references[slot] += 1
        slots += self._allocate(wanted)
        running = Running(
            request=request, tokens=tokens, keys=hit[:on_gpu], slots=slots, hit_blocks=len(hit), cached=on_gpu
        )
        for key in hit:
            if key in self._cpu:
                self._cpu.move_to_end(key)
        self._cache_full(running)
        return running

    def extend(self, running: Running, tokens: Sequence[int]) -> None:
        """Append tokens that were generated and computed (the very last sample of a request never is).

        Raises:
            PoolFullError: too few free blocks; nothing was changed.
        """
        length = len(running.tokens) + len(tokens)
        wanted = -(-length // self.block_size_tokens) - len(running.slots)
        if wanted > len(self._free):
            raise PoolFullError(f"{wanted} blocks wanted, {len(self._free)} of {self.blocks} free")
        if wanted > 0:
            running.slots += self._allocate(wanted)
        running.tokens.extend(tokens)
        self._cache_full(running)

    def finish(self, running: Running) -> None:
        """Give a request's blocks back, last block first; their contents stay until the slots are needed."""
        forgotten: list[int] = []
        for slot in reversed(running.slots):
            self._references[slot] -= 1
            if self._references[slot]:
                continue
            if self._key_of[slot] is None:
                forgotten.append(slot)
            else:
                self._free[slot] = None
        for slot in reversed(forgotten):
            self._free[slot] = None
            self._free.move_to_end(slot, last=False)
        running.slots = []

    def clear(self) -> bool:
        """Drop everything on the GPU; refused (False) while requests run, as engines do."""
        if len(self._free) != self.blocks:
            return False
        self._slots_of.clear()
        self._key_of = [None] * self.blocks
        self._events.append(ClearedCache())
        return True

    def take_events(self) -> list[CacheEvent]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # --- inside -------------------------------------------------------------------------------------------------

    def _allocate(self, count: int) -> list[int]:
        slots = []
        for _ in range(count):
            slot, _ = self._free.popitem(last=False)
            self._evict(slot)
            self._references[slot] = 1
            slots.append(slot)
        return slots

    def _evict(self, slot: int) -> None:
        key = self._key_of[slot]
        if key is None:
            return
        self._key_of[slot] = None
        copies = self._slots_of[key]
        del copies[slot]
        if not copies:
            del self._slots_of[key]
        self._events.append(RemovedBlock(key=key))

    def _cache_full(self, running: Running) -> None:
        size = self.block_size_tokens
        request = running.request
        first = running.cached
        full = len(running.tokens) // size
        if first >= full:
            return
        running.keys = self.hasher.chain(
            running.tokens, known=running.keys, cache_salt=request.cache_salt, lora=request.lora
        )
        for number in range(first, full):
            slot, key = running.slots[number], running.keys[number]
            self._key_of[slot] = key
            self._slots_of.setdefault(key, {})[slot] = None
        running.cached = full
        self._events.append(
            StoredBlocks(
                keys=running.keys[first:full],
                parent=running.keys[first - 1] if first else None,
                tokens=running.tokens[first * size : full * size],
                lora=request.lora,
                extra=[extra_of(number, request.cache_salt, request.lora) for number in range(first, full)],
            )
        )
        self._offload(running.keys[first:full])

    def _offload(self, keys: Sequence[int]) -> None:
        if not self._cpu_blocks:
            return
        fresh = []
        for key in keys[: self._cpu_blocks]:
            if key not in self._cpu:
                fresh.append(key)
            self._cpu[key] = None
            self._cpu.move_to_end(key)
        while len(self._cpu) > self._cpu_blocks:
            gone, _ = self._cpu.popitem(last=False)
            self._events.append(RemovedBlock(key=gone, medium=CPU))
        if fresh:
            self._events.append(StoredBlocks(keys=fresh, medium=CPU))
