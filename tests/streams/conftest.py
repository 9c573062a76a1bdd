"""A resolve agent and an index over plain dicts, with a log between them that tests can repeat and delay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import pytest

from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, partition_of, root_key
from kvatlas.bridge.model.events import Tier
from kvatlas.streams.index.apply import apply_blocks
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.holders import Holder, holders
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import DeadLetter
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver
from tests.engine_events import removed, stored

PARTITIONS = 4
MODEL = "demo"


class World:
    """One deployment in memory; every message is also kept in ``log``."""

    def __init__(self, **options: Any) -> None:
        self.options = ResolveOptions(**options)
        self.resolver = Resolver(self.options, PARTITIONS, lambda: 7)
        self.engine = DictView()
        self.index = [DictView() for _ in range(PARTITIONS)]
        self.log: list[tuple[bytes, bytes, list[tuple[str, bytes]]]] = []
        self.updates: list[tuple[int, bytes]] = []
        self.pods: dict[str, records.PodRecord] = {}
        self.counts: Counter[str] = Counter()
        self.index_counts: Counter[str] = Counter()
        self.dead: list[DeadLetter] = []
        self.notices: list[tuple[str, str]] = []
        self.urgent = False
        self._next: dict[str, int] = {}
        self._incarnation: dict[str, int] = {}

    # --- the bridge's side

    def send(
        self,
        pod: str,
        *events: Mapping[str, Any] | Sequence[Any],
        sequence: int | None = None,
        incarnation: int | None = None,
        deliver: bool = True,
        **headers: str,
    ) -> None:
        payload = msgspec.msgpack.encode((1000.5, list(events), None))
        self.raw(pod, payload, sequence=sequence, incarnation=incarnation, deliver=deliver, **headers)

    def raw(
        self,
        pod: str,
        payload: bytes,
        *,
        sequence: int | None = None,
        incarnation: int | None = None,
        deliver: bool = True,
        **headers: str,
    ) -> None:
        if sequence is None:
            sequence = self._next.get(pod, 0)
        self._next[pod] = sequence + 1
        incarnation = self._incarnation.setdefault(pod, 1) if incarnation is None else incarnation
        fields = {"sequence": str(sequence), "incarnation": str(incarnation), "model": MODEL, **headers}
        self.log.append((pod.encode(), payload, [(name, value.encode()) for name, value in fields.items()]))
        if deliver:
            self.deliver(self.log[-1:])

    def control(self, pod: str, kind: str, *, lost: tuple[int, int] = (-1, -1), deliver: bool = True) -> None:
        incarnation = self._incarnation[pod] = self._incarnation.get(pod, 1) + 1
        record = records.Control(type=kind, incarnation=incarnation, first_lost=lost[0], last_lost=lost[1])
        if kind == "gap" and lost[1] >= 0:
            self._next[pod] = lost[1] + 1
        elif kind != "gap":
            self._next[pod] = 0
        self.log.append((pod.encode(), records.encode(record), [("content_type", b"control")]))
        if deliver:
            self.deliver(self.log[-1:])

    # --- the agents

    def resolve(self, log: Sequence[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> list[tuple[int, bytes]]:
        """Resolve messages in one flush; returns the kv-blocks records without applying them."""
        effects = self.resolver.effects()
        for offset, (key, value, headers) in enumerate(log):
            self.resolver.apply(self.engine, parse_message(key, value, headers, 0, offset), effects)
        self.pods.update(effects.pods)
        self.counts += effects.counts
        self.dead += effects.dead
        self.notices += effects.notices
        self.urgent = effects.urgent
        return [(partition, value) for partition, values in effects.encode().items() for value in values]

    def apply(self, updates: Sequence[tuple[int, bytes]]) -> None:
        for partition, value in updates:
            apply_blocks(self.index[partition], decode_blocks(value), self.index_counts)

    def deliver(self, log: Sequence[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> None:
        updates = self.resolve(log)
        self.updates += updates
        self.apply(updates)

    # --- the reader's side

    def state(self, pod: str) -> eb.PodState:
        value = self.engine.get(eb.state_key(pod_ids.pod_ref(pod).to_bytes(8, "big")))
        assert value is not None
        return eb.decode_state(value)

    def value(self, key: bytes) -> bytes:
        return self.index[partition_of(key, PARTITIONS)].get(key) or b""

    def holders(self, key: bytes) -> list[Holder]:
        """Return a key's holders that exist by the pods' records, as a scorer sees them."""
        by_ref = {pod_ids.pod_ref(pod): record for pod, record in self.pods.items()}
        found = []
        for holder in holders(self.value(key)):
            pod = by_ref.get(holder.pod_ref)
            if pod is not None:
                bound = pod.valid_from
                if holder.tier == Tier.GPU:
                    bound = max(bound, pod.gpu_valid_from)
                if holder.epoch < bound:
                    continue
            found.append(holder)
        return found

    def where(self, pod: str, key: bytes) -> set[tuple[int, int]]:
        """Return the (tier, group) pairs under which a pod holds a block."""
        ref = pod_ids.pod_ref(pod)
        return {(holder.tier, holder.group) for holder in self.holders(key) if holder.pod_ref == ref}

    def held(self, pod: str, keys: Sequence[bytes]) -> list[bool]:
        return [bool(self.where(pod, key)) for key in keys]

    def suspect(self, pod: str, key: bytes) -> bool:
        ref = pod_ids.pod_ref(pod)
        return any(h.epoch < self.pods[pod].suspect_before for h in self.holders(key) if h.pod_ref == ref)

    def resolves(self, pod: str, engine_key: int, group: int = 0) -> bool:
        """Tell whether an engine key stands for something that a live tier holds."""
        prefix = eb.block_prefix(pod_ids.pod_ref(pod).to_bytes(8, "big"), group)
        value = self.engine.get(prefix + engine_key.to_bytes(8, "big"))
        state = self.state(pod)
        return value is not None and any(
            state.live(tier, held[1]) for tier, held in eb.decode_block(value).tiers.items()
        )

    def keys(self, tokens: Sequence[int], *, lora: str | None = None, salt: str | None = None) -> list[bytes]:
        root = root_key(MODEL, lora, salt)
        return block_keys(root, pack_tokens(tokens), self.options.block_size_tokens)


class Make:
    """What tests build messages with."""

    stored = staticmethod(stored)
    removed = staticmethod(removed)
    cleared: ClassVar[Any] = {"type": "AllBlocksCleared"}

    @staticmethod
    def run(first: int, last: int) -> list[int]:
        """Return the tokens ``first`` to ``last``, both included."""
        return list(range(first, last + 1))


@pytest.fixture
def make() -> type[Make]:
    """Builders of events."""
    return Make


@pytest.fixture
def world() -> Callable[..., World]:
    """Return the class of worlds, to be called with resolve options."""
    return World
