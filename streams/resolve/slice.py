"""Slice: messages that are resolved together, so that each pod's state is decoded and encoded once.

Also the bounds of one message: what it may cost in dead letters, and the parts in which its events are applied, so that
whoever drives the resolver can give way to others between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import pod_ids
from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.bridge.model.events import Cleared, Event, Removed, Stored
from kvatlas.bridge.model.numbers import COUNT_MAX
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.index.view import View
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import DeadLetter, Effects
from kvatlas.streams.resolve.engine_blocks import PodState
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.pod_blocks import PodBlocks

#: Dead letters of one message; what is more is counted in one further letter.
LETTERS: Final = 8
#: Blocks that are applied before others get their turn: about 4 ms, 20 ms where blocks share canonical blocks.
PART_BLOCKS: Final = 2_048


#: The year 2262, where ns no longer fit 63 bits.
_LATEST_SECONDS: Final = 9.2e9
#: What an event costs beside its blocks, in blocks.
_EVENT_BLOCKS: Final = 8


#: An event, or a part of a large one, that is applied next: the event or part; the table keys of its blocks; the event
#: as it came, with its first part alone; the event behind it in the message; whether another part of it follows.
Planned = tuple[Event, list[bytes], Event | None, Event | None, bool]

_EMPTY: Final[list[bytes]] = []


class PodSession:
    """One pod during a slice.

    Attributes:
        number: the pod's reference.
        ref: the same as 8 bytes.
        state: where the pod stands; written at the end of the slice.
        blocks: its engine blocks, None before the first message of the stream.
    """

    __slots__ = ("blocks", "number", "ref", "state")

    def __init__(self, number: int, ref: bytes, state: PodState) -> None:
        self.number, self.ref, self.state = number, ref, state
        self.blocks: PodBlocks | None = None


class Slice:
    """Messages that are resolved together over one view.

    Args:
        view: the partition of ``engine_blocks``; nobody else writes to the pods' states in it meanwhile.
        effects: gathers what is to be written elsewhere.
        describe: makes the ``kv-pods`` record of a state.
    """

    def __init__(self, view: View, effects: Effects, describe: Callable[[PodState], PodRecord]) -> None:
        self.view, self.effects = view, effects
        self._describe = describe
        self._sessions: dict[int, PodSession] = {}
        self._changed: dict[int, PodSession] = {}
        self._letters = 0
        self._omitted: DeadLetter | None = None

    def session(self, pod: str) -> PodSession | None:
        """Return a pod's session; None when nothing is known of the pod.

        Raises:
            WireError: another pod has the same reference.
        """
        number = pod_ids.pod_ref(pod)
        found = self._sessions.get(number)
        if found is None:
            ref = number.to_bytes(8, "big")
            value = self.view.get(eb.state_key(ref))
            if value is None:
                return None
            found = self._sessions[number] = PodSession(number, ref, eb.decode_state(value))
        if found.state.pod != pod:
            raise WireError(
                f"pod ids {pod!r} and {found.state.pod!r} have the same 64-bit reference; rename one of them"
            )
        return found

    def begin(self, pod: str) -> PodSession:
        """Return the session of a pod of which nothing is known."""
        number = pod_ids.pod_ref(pod)
        state = PodState(eb.SCHEMA_VERSION, pod)
        made = self._sessions[number] = PodSession(number, number.to_bytes(8, "big"), state)
        return made

    def changed(self, session: PodSession, message: Message) -> None:
        """Take note that a message moved a pod's state."""
        state = session.state
        state.receive_ns = max(state.receive_ns, message.receive_ns)
        state.events_partition, state.events_offset = message.partition, message.offset
        self._changed[session.number] = session

    def bury(self, message: Message, raw: bytes, reason: str) -> None:
        """Dead-letter one event of a message, or all of it; of many, only the first."""
        self._letters += 1
        if self._letters <= LETTERS:
            self.effects.dead.append(_letter(message, raw, reason))
        elif self._omitted is None:
            self._omitted = _letter(message, raw, reason)

    def end_message(self) -> None:
        """Say in one letter how many further events of the message were not kept."""
        if self._omitted is not None:
            reason = f"{self._letters - LETTERS} more events of this message, the first of them: {self._omitted.reason}"
            self.effects.dead.append(self._omitted._replace(reason=reason))
            self._omitted = None
        self._letters = 0

    def finish(self) -> None:
        """Write the states of the pods that changed."""
        for session in self._changed.values():
            self._write(session)
        self._changed.clear()

    def release(self, pod: str) -> None:
        """Write the state of one pod, which goes on elsewhere; it is read anew if it comes back."""
        number = pod_ids.pod_ref(pod)
        self._sessions.pop(number, None)
        session = self._changed.pop(number, None)
        if session is not None:
            self._write(session)

    def _write(self, session: PodSession) -> None:
        state = session.state
        self.view.put(eb.state_key(session.ref), eb.encode_state(state))
        self.effects.changed(state.pod, partial(self._describe, state))


def _letter(message: Message, raw: bytes, reason: str) -> DeadLetter:
    return DeadLetter(message.pod, raw, reason, message.partition, message.offset, message.headers)


def note_lost(state: PodState, first: int, last: int) -> None:
    """Note that messages of a pod are lost, from one sequence to another."""
    state.first_lost, state.last_lost = first, last
    if 0 <= first <= last:
        state.lost = min(state.lost + last - first + 1, COUNT_MAX)


def raw_event(event: msgspec.Struct) -> bytes:
    """Return an event's bytes for a dead letter."""
    return msgspec.msgpack.encode(event)


def parts(event: Event, most: int) -> Iterator[Event]:
    """Yield events of at most ``most`` blocks which together say what one event says.

    A part chains from the last block of the part before it, as the blocks of one event chain from each other. What
    stands for the event as a whole (a token behind it, tokens before it) is left in one piece.
    """
    if isinstance(event, Cleared) or len(event.keys) <= most:
        yield event
    elif isinstance(event, Removed):
        for at in range(0, len(event.keys), most):
            some, left = event.keys[at : at + most], event.remaining[at : at + most]
            yield msgspec.structs.replace(event, keys=some, remaining=left)
    elif event.ahead or event.unnamed or event.context is not None:
        yield event
    else:
        for at in range(0, len(event.keys), most):
            yield _stored_part(event, at, at + most)


def _stored_part(event: Stored, at: int, end: int) -> Stored:
    width = event.block_size_tokens * TOKEN_BYTES
    lined_up = bool(event.tokens) and not event.masked
    return msgspec.structs.replace(
        event,
        keys=event.keys[at:end],
        parent=event.keys[at - 1] if at else event.parent,
        tokens=event.tokens[at * width : end * width] if lined_up else event.tokens,
        extra=event.extra[at:end],
    )


def planned_parts(events: list[Event], blocks: PodBlocks) -> Iterator[tuple[list[Planned], int]]:
    """Yield the events of a message in parts that are fetched and applied in one go, and the blocks in each part."""
    if not events:
        return
    followers = [*events[1:], None]
    size = _EVENT_BLOCKS * len(events)
    for event in events:
        if not isinstance(event, Cleared):
            size += len(event.keys)
    if size <= PART_BLOCKS:  # nearly every message
        pairs = zip(events, followers, strict=True)
        yield [(event, _table_keys(event, blocks), event, after, False) for event, after in pairs], size
        return
    planned: list[Planned] = []
    size = 0
    for whole, follower in zip(events, followers, strict=True):
        pieces = list(parts(whole, PART_BLOCKS))
        for left, event in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
            table_keys = _table_keys(event, blocks)
            planned.append((event, table_keys, whole if event is pieces[0] else None, follower, left > 0))
            size += _EVENT_BLOCKS + len(table_keys)
            if size >= PART_BLOCKS:
                yield planned, size
                planned, size = [], 0
    if planned:
        yield planned, size


def _table_keys(event: Event, blocks: PodBlocks) -> list[bytes]:
    return _EMPTY if isinstance(event, Cleared) else blocks.table_keys(event)


def wanted_keys(planned: list[Planned], blocks: PodBlocks) -> list[bytes]:
    """Return the table keys that a part of a message will read first."""
    wanted: list[bytes] = []
    for event, table_keys, *_ in planned:
        wanted += table_keys
        if isinstance(event, Stored) and event.parent is not None:
            wanted.append(blocks.table_key(event.group, event.parent))
    return wanted


def nanoseconds(seconds: float) -> int:
    """Return an engine's clock in ns; 0 for what is no time of day (an engine may send anything)."""
    return int(seconds * 1e9) if 0 <= seconds < _LATEST_SECONDS else 0
