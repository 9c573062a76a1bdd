"""Chunks that LMCache servers hold: their event streams folded, and what the index is to be told of the changes. Pure.

A :class:`CacheFleet` takes every server's batches in the order of its sequence. What it keeps is per *holder*: a
server's own compartments, or a pool that several servers mount.

A chunk counts as held once every rank, and every group that the model is known to have, is there: in host memory all
of it, else on the tiers behind. Its name is (model, salt, hash).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, Protocol

import msgspec
from xxhash import xxh3_128_digest

from kvatlas.bridge.model.adapters.lmcache import DELETE, HOST, STORE, CacheBatch, ChunkEntry
from kvatlas.bridge.model.block_key import KEY_BYTES, pack_tokens, root_key
from kvatlas.bridge.model.chunk_chains import ChunkChains
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.records import KeyedRemoved, KeyedStored

#: Servers that are followed, mapped or not; each costs little.
_SERVERS_MAX: Final = 10_000


class Name(NamedTuple):
    """What a chunk is: the same tokens under another salt or model are another one."""

    model: str
    salt: str
    chunk: bytes

    @property
    def engine_key(self) -> bytes:
        """The key that stands for it in events."""
        return xxh3_128_digest(msgspec.msgpack.encode((self.model, self.salt)) + self.chunk)


#: World size, rank and group.
Part = tuple[int, int, int]
#: Tier and backend.
Place = tuple[str, str]


class Chains(Protocol):
    """What knows the tokens of chunks."""

    def keys(self, chunk: bytes, root: bytes, canonical_tokens: int, /) -> bytes | None:
        """Return the packed canonical keys of a chunk's tokens behind a root; None while they are not known."""

    def tokens_of(self, chunk: bytes, /) -> int:
        """Return how many tokens a chunk has."""


class ServerStream(msgspec.Struct):
    """Where one server's stream stands.

    Attributes:
        heard_from: first sequence from which on nothing of this incarnation is missing.
        first_lost, last_lost, lost: the newest hole, and batches missed in all.
        pools: backends of the pools that it mounts.
    """

    incarnation: int = -1
    seq: int = 0
    heard_from: int = 0
    first_lost: int = -1
    last_lost: int = -1
    lost: int = 0
    ts: float = 0.0
    pools: set[str] = msgspec.field(default_factory=set)


class ChunkHolder:
    """What one server, or one pool, holds.

    Attributes:
        doubted: chunks that were held before the newest hole and not announced since.
        gap: whether there was a hole that the index was not told of.
        over: parts that were not taken, because of the limit.
    """

    def __init__(self, chains: Chains, canonical_tokens: int, limit: int) -> None:
        """Start empty."""
        self.doubted: set[Name] = set()
        self.gap = False
        self.over = 0
        self._chains = chains
        self._canonical = canonical_tokens
        self._limit = limit
        self._held: dict[Name, dict[Part, set[Place]]] = {}
        self._names: dict[bytes, set[Name]] = {}
        self._groups: dict[str, set[int]] = {}
        self._told: dict[Name, Tier] = {}
        self._changed: dict[Name, None] = {}
        self._again: set[Name] = set()  # told before a hole, and held for certain since

    def __len__(self) -> int:
        return len(self._held)

    @property
    def changed(self) -> bool:
        """Whether there may be something to tell."""
        return bool(self._changed) or self.gap

    def store(self, name: Name, part: Part, place: Place) -> bool:
        """Take note of one part at one place; returns whether there was room."""
        parts = self._held.get(name)
        if parts is None:
            if len(self._held) >= self._limit:
                self.over += 1
                return False
            parts = self._held[name] = {}
            self._names.setdefault(name.chunk, set()).add(name)
        parts.setdefault(part, set()).add(place)
        if name in self.doubted:
            self.doubted.discard(name)
            self._again.add(name)
        self._changed[name] = None
        self._note_group(name.model, part[2])
        return True

    def delete(self, name: Name, part: Part, place: Place) -> None:
        """Take note that one part is no longer at one place."""
        parts = self._held.get(name)
        if parts is None or part not in parts:
            return
        parts[part].discard(place)
        self._settle(name, parts)

    def void(self, tier: str) -> None:
        """Forget all that is on one tier."""
        for name, parts in list(self._held.items()):
            for places in parts.values():
                places -= {place for place in places if place[0] == tier}
            self._settle(name, parts)

    def doubt(self) -> None:
        """Take note of a hole: what was held before may be gone."""
        self.doubted = set(self._held)
        self.gap = True

    def resolved(self, chunk: bytes) -> None:
        """Take note that a chunk's tokens are known now."""
        for name in self._names.get(chunk, ()):
            self._changed[name] = None

    def restate(self) -> None:
        """Tell all that is held, to an index that knows nothing of it."""
        self._told.clear()
        self._again.clear()
        self._changed = dict.fromkeys(self._held)
        self.gap = bool(self.doubted)

    def split(self) -> dict[Name, None]:
        """Return the changes that are to be told behind the hole, and keep those that are told before it."""
        behind = {name: None for name in self._changed if name not in self.doubted}
        self._changed = {name: None for name in self._changed if name in self.doubted}
        return behind

    def join(self, behind: dict[Name, None], *, told: bool) -> None:
        """Take back what :meth:`split` returned; ``told`` when the index was told of the hole meanwhile."""
        self.gap = not told
        self._changed |= behind

    def tier(self, name: Name) -> Tier | None:
        """Return where a whole chunk is; None where a part of it is missing."""
        parts = self._held.get(name, {})
        found: Tier | None = None
        for world in {part[0] for part in parts}:
            needed = [
                parts.get((world, rank, group)) for rank in range(max(world, 1)) for group in self._groups[name.model]
            ]
            if not all(needed):
                continue
            if all(any(place[0] == HOST for place in places or ()) for places in needed):
                return Tier.CPU
            found = Tier.DISK
        return found

    def changes(self, most_bytes: int) -> Iterator[list[KeyedStored | KeyedRemoved]]:
        """Yield what the index is to be told, in lists of about so many bytes; what was yielded counts as told."""
        events: list[KeyedStored | KeyedRemoved] = []
        size = 0
        while self._changed:
            name = next(iter(self._changed))
            del self._changed[name]
            for event in self._change(name):
                events.append(event)
                size += 64 + (len(event.block_keys) if isinstance(event, KeyedStored) else 0)
            if size >= most_bytes:
                yield events
                events, size = [], 0
        if events:
            yield events

    def _change(self, name: Name) -> Iterator[KeyedStored | KeyedRemoved]:
        before, tier = self._told.get(name), self.tier(name)
        packed = None
        if tier is not None and (tier != before or name in self._again):
            packed = self._chains.keys(name.chunk, root_key(name.model, None, name.salt), self._canonical)
            if packed is None:
                tier = before if tier == before else None
        again = name in self._again
        self._again.discard(name)
        if tier == before and not again:
            return
        if before is not None and before != tier:
            del self._told[name]
            yield KeyedRemoved(engine_keys=[name.engine_key], tier=int(before), group=0)
        if tier is not None and packed is not None:
            self._told[name] = tier
            yield KeyedStored(
                engine_keys=[name.engine_key],
                parent=None,
                block_keys=packed,
                keys_per_block=len(packed) // KEY_BYTES,
                tier=int(tier),
                group=0,
                kind=int(Kind.FULL),
                window_tokens=0,
                block_size_tokens=self._chains.tokens_of(name.chunk),
                salted=bool(name.salt),
            )

    def _settle(self, name: Name, parts: dict[Part, set[Place]]) -> None:
        for part in [part for part, places in parts.items() if not places]:
            del parts[part]
        if not parts:
            del self._held[name]
            self.doubted.discard(name)
            names = self._names[name.chunk]
            names.discard(name)
            if not names:
                del self._names[name.chunk]
        self._changed[name] = None

    def _note_group(self, model: str, group: int) -> None:
        """Learn that a model has a group: what was whole without it is not."""
        groups = self._groups.setdefault(model, set())
        if group not in groups:
            groups.add(group)
            self._changed.update(dict.fromkeys(name for name in self._held if name.model == model))


class CacheFleet:
    """All servers of an event topic.

    Attributes:
        servers: instance -> where its stream stands.
        holders: instance, or backend of a pool (:meth:`pool`), -> what it holds.
        duplicates, late: batches dropped for their sequence or incarnation.
        gaps: holes.
        unlisted: batches of servers that are not listed.
    """

    def __init__(self, models: Mapping[str, str], canonical_tokens: int, limit: int) -> None:
        """Start empty.

        Args:
            models: listed instance -> the model that its chunks are of, empty for what its events say.
            canonical_tokens: tokens in a block of the index.
            limit: chunks that a holder keeps, and chunks whose tokens are remembered.
        """
        self.servers: dict[str, ServerStream] = {}
        self.holders: dict[str, ChunkHolder] = {}
        self.duplicates = self.late = self.gaps = self.unlisted = 0
        self._models = models
        self._canonical = canonical_tokens
        self._limit = limit
        self._chains = ChunkChains(limit)

    @staticmethod
    def pool(backend: str) -> str:
        """Return the name of a pool among the holders; no instance's has a line feed."""
        return f"\n{backend}"

    def apply(self, batch: CacheBatch) -> None:
        """Take one batch."""
        server = self._admit(batch)
        if server is None:
            return
        if batch.shared:
            server.pools.add(batch.backend)
        if batch.event_type not in (STORE, DELETE):
            return
        holder = self._holder(batch)
        before = b""
        for entry in batch.entries:
            chunk = entry.key.chunk
            if batch.event_type == STORE:
                self._learn(entry, chunk, before)
                before = chunk
            if holder is None:
                continue
            model = self._models.get(batch.instance_id) or entry.key.model_name
            move = holder.store if batch.event_type == STORE else holder.delete
            move(Name(model, entry.key.cache_salt, chunk), entry.key.part, (batch.tier, batch.backend))

    def _admit(self, batch: CacheBatch) -> ServerStream | None:
        """Return the server that a batch moves on; None for a batch that comes late or again."""
        server = self.servers.get(batch.instance_id)
        if server is None:
            if len(self.servers) >= _SERVERS_MAX:
                self.unlisted += 1
                return None
            server = self.servers[batch.instance_id] = ServerStream()
        if batch.incarnation < server.incarnation:
            self.late += 1
            return None
        if batch.incarnation > server.incarnation:
            if (holder := self.holders.get(batch.instance_id)) is not None:
                holder.void(HOST)
            if batch.seq > 1 and server.incarnation >= 0:
                self._missed(batch.instance_id, server, 1, batch.seq - 1)
            server.incarnation, server.heard_from = batch.incarnation, 0 if batch.seq <= 1 else batch.seq
        elif batch.seq <= server.seq:
            self.duplicates += 1
            return None
        elif batch.seq > server.seq + 1:
            self._missed(batch.instance_id, server, server.seq + 1, batch.seq - 1)
            server.heard_from = batch.seq
        server.seq, server.ts = batch.seq, batch.ts
        return server

    def _missed(self, instance: str, server: ServerStream, first: int, last: int) -> None:
        self.gaps += 1
        server.first_lost, server.last_lost = first, last
        server.lost += last - first + 1
        for name in (instance, *map(self.pool, server.pools)):
            if (holder := self.holders.get(name)) is not None:
                holder.doubt()

    def _holder(self, batch: CacheBatch) -> ChunkHolder | None:
        """Return who holds what a batch says; None for the own compartments of a server that is not listed."""
        name = self.pool(batch.backend) if batch.shared else batch.instance_id
        holder = self.holders.get(name)
        if holder is None:
            if (not batch.shared and name not in self._models) or len(self.holders) >= _SERVERS_MAX:
                self.unlisted += 1
                return None
            holder = self.holders[name] = ChunkHolder(self._chains, self._canonical, self._limit)
        return holder

    def _learn(self, entry: ChunkEntry, chunk: bytes, before: bytes) -> None:
        if entry.token_offset < 0 or not entry.token_ids:
            return
        for each in self._chains.learn(chunk, pack_tokens(entry.token_ids), entry.token_offset, before):
            for holder in self.holders.values():
                holder.resolved(each)
