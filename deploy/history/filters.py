"""Which records of a log somebody wants to see, decided as cheaply as the question allows.

Pod and model are read from key and headers. Event types need the summary of a message. Block keys are no part of an
engine's message: they are found by resolving the messages as the workers do, from the start of the range, so a chain
whose beginning lies before the range cannot be followed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import block_key, pod_ids, records, topics
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.summary import REMOVED, STORED, Message, MessageLine, read_message
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, decode_blocks
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver

_KEY: Final = block_key.KEY_BYTES
_OPERATIONS: Final = {STORED: OP_ADD, REMOVED: OP_REMOVE}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a record must match; empty means anything.

    Attributes:
        pods: pod ids.
        models: model names.
        types: event types (:data:`kvatlas.deploy.history.summary.TYPES`).
        keys: block keys, 16 bytes each.
    """

    pods: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    keys: frozenset[bytes] = frozenset()


#: Topic -> flags of ``kvatlas replay`` that its records can be filtered by.
FILTERS: Final = {
    topics.EVENTS: frozenset({"pod", "model", "type", "key", "tokens"}),
    topics.BLOCKS: frozenset({"pod", "type", "key", "tokens"}),
    topics.DECISIONS: frozenset({"pod", "model", "key", "tokens"}),
    topics.PODS: frozenset({"pod", "model"}),
    topics.DLQ: frozenset({"pod"}),
    topics.WORKERS: frozenset[str](),
}


def prefix_keys(
    tokens: Iterable[int], model: str, lora: str | None, cache_salt: str | None, block_size_tokens: int
) -> frozenset[bytes]:
    """Return the block keys of a token prefix, for :attr:`Wanted.keys`."""
    packed = block_key.pack_tokens(list(tokens))
    return frozenset(block_key.block_keys(block_key.root_key(model, lora, cache_salt), packed, block_size_tokens))


class Filter:
    """Decides record by record; holds the state that following block keys needs."""

    def __init__(self, wanted: Wanted, block_size_tokens: int = 16) -> None:
        self._wanted = wanted
        self._pods = {pod.encode() for pod in wanted.pods}
        self._pod_refs = {pod_ids.pod_ref(pod) for pod in wanted.pods}
        self._models = {model.encode() for model in wanted.models}
        self._views: dict[str, DictView] = {}
        self._resolver = Resolver(ResolveOptions(block_size_tokens=block_size_tokens), 1, lambda: 0)

    def message(self, record: Record) -> Message | None:
        """Return a ``kv-events`` record that matches, decoded; None for one that does not."""
        wanted = self._wanted
        if self._pods and record.key not in self._pods:
            return None
        if wanted.keys and not self._touches(record):
            return None
        headers = dict(record.headers)
        if self._models and headers.get(topics.H_MODEL) not in self._models:
            return None
        found = read_message(record, headers)
        return found if not wanted.types or found.has_type(wanted.types) else None

    def line(self, message: Message) -> MessageLine:
        """Return what is printed of a message: the events of the wanted types."""
        line = message.line()
        if not self._wanted.types:
            return line
        return msgspec.structs.replace(
            line, events=[event for event in line.events if event.type in self._wanted.types]
        )

    def events(self, record: Record) -> MessageLine | None:
        """Return the summary of a ``kv-events`` record that matches, None for one that does not."""
        found = self.message(record)
        return None if found is None else self.line(found)

    def types(self, message: Message) -> list[str]:
        """Return the types of a message's events that are wanted."""
        found = message.types()
        return [name for name in found if name in self._wanted.types] if self._wanted.types else found

    def other(self, record: Record) -> bool:
        """Tell whether a record of any topic but ``kv-events`` matches, by what :data:`FILTERS` has for it."""
        if record.topic == topics.BLOCKS:
            return self.blocks(record)
        if record.topic == topics.DECISIONS:
            return self.decision(record)
        if record.topic == topics.PODS:
            return self._pod(record)
        return not self._pods or record.topic != topics.DLQ or record.key in self._pods

    def _pod(self, record: Record) -> bool:
        if self._pods and (record.key or b"").rpartition(b"|")[2] not in self._pods:
            return False
        if not self._models:
            return True
        try:
            return records.decode(records.PodRecord, record.value or b"").model in self._wanted.models
        except WireError:
            return False

    def blocks(self, record: Record) -> bool:
        """Tell whether a ``kv-blocks`` record matches the pods, types (stored, removed) and block keys."""
        if not (self._wanted.pods or self._wanted.keys or self._wanted.types):
            return True
        try:
            found = decode_blocks(record.value or b"")
        except WireError:
            return False
        if self._wanted.types and not any(
            name in _OPERATIONS and _OPERATIONS[name] in found.ops for name in self._wanted.types
        ):
            return False
        if self._pod_refs and not any(run.pod_ref in self._pod_refs for run in found.runs):
            return False
        return not self._wanted.keys or _any_key(found.keys, self._wanted.keys)

    def decision(self, record: Record) -> bool:
        """Tell whether a ``kv-decisions`` record matches the pods, models and block keys."""
        try:
            found = records.decode(records.DecisionRecord, record.value or b"")
        except WireError:
            return not (self._wanted.pods or self._wanted.models or self._wanted.keys)
        return (
            (not self._wanted.pods or found.pod in self._wanted.pods)
            and (not self._wanted.models or found.model in self._wanted.models)
            and (not self._wanted.keys or _any_key(found.keys, self._wanted.keys))
        )

    def _touches(self, record: Record) -> bool:
        """Resolve a message and tell whether it adds or removes one of the wanted blocks."""
        message = parse_message(record.key, record.value, record.headers, record.partition, record.offset)
        effects = Effects(1)
        self._resolver.apply(self._views.setdefault(message.pod, DictView()), message, effects)
        return any(not self._wanted.keys.isdisjoint(segment.keys) for segment in effects.segments)


def _any_key(packed: bytes, keys: Collection[bytes]) -> bool:
    return any(packed[at : at + _KEY] in keys for at in range(0, len(packed), _KEY))
