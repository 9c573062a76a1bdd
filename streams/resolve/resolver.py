"""Resolve: one ``kv-events`` message into changes of ``engine_blocks`` and block updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

import msgspec

from kvatlas.bridge.errors import LimitError, WireError
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.adapters import CLEARS_HOST, adapter
from kvatlas.bridge.model.block_key import root_key
from kvatlas.bridge.model.events import Event, Limits, Removed, Stored, Tier
from kvatlas.streams.index.view import View
from kvatlas.streams.resolve.effects import Effects, PodUpdates, Sighting
from kvatlas.streams.resolve.engine_blocks import PodState
from kvatlas.streams.resolve.message import ABSENT, Message, parse_message
from kvatlas.streams.resolve.naming import note_limits, note_names, note_stripped
from kvatlas.streams.resolve.pod_blocks import PodBlocks
from kvatlas.streams.resolve.slice import (
    PART_BLOCKS,
    PodSession,
    Slice,
    nanoseconds,
    note_lost,
    planned_parts,
    raw_event,
    wanted_keys,
)
from kvatlas.streams.resolve.stripped import KeyedEvent, check_stripped, removed_of, stored_of, stripped_parts
from kvatlas.streams.resolve.updates import BlockLimits

__all__ = ["Message", "ResolveOptions", "Resolver", "parse_message", "pod_record"]

START: Final = "start"
GAP: Final = "gap"
RESTART: Final = "restart"
GONE: Final = "gone"
CONTROLS: Final = frozenset({START, GAP, RESTART, GONE})

_EMPTY: Final[list[bytes]] = []
_ROOTS: Final = 65_536


class ResolveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment decides about the meaning of events.

    Attributes:
        block_size_tokens: canonical block size.
        announcements: ``copies``: an engine announces every copy of a block and every eviction of one; ``presence``:
            it announces a block once or again and again, and its eviction once; ``auto``: copies, but for reports of
            what is there, which are known by their place in the stream. A message's header wins.
        clears: what AllBlocksCleared ends: ``all`` tiers, the ``gpu`` alone, or what it ends in each ``engine``.
        strict_gaps: an unrepaired gap ends the pod's epoch instead of making older entries suspect.
        orphan_blocks: blocks that wait for an unknown parent, per pod, at most.
        store: shared store of pods that do not say which they mount.
        limits: bounds of one message.
    """

    block_size_tokens: int = 16
    announcements: Literal["auto", "copies", "presence"] = "auto"
    clears: Literal["engine", "all", "gpu"] = "engine"
    strict_gaps: bool = False
    orphan_blocks: int = 8192
    store: str = "default"
    limits: Limits = Limits()


Clock = Callable[[], int]


class Resolver:
    """Applies messages one by one; keeps nothing between them but caches of pure functions.

    Args:
        options: what the deployment decided.
        partitions: partitions of ``kv-blocks``.
        clock: wall clock, ns since the epoch.
    """

    def __init__(self, options: ResolveOptions, partitions: int, clock: Clock) -> None:
        self._options = options
        self._partitions = partitions
        self._clock = clock
        self._roots: dict[tuple[str, str | None, str | None], bytes] = {}

    def effects(self) -> Effects:
        """Return empty effects for one flush."""
        return Effects(self._partitions)

    def slice(self, view: View, effects: Effects) -> Slice:
        """Return an empty slice of messages; :meth:`Slice.finish` ends it.

        Args:
            view: the ``engine_blocks`` partition of the pods.
            effects: gathers what is to be written elsewhere.
        """
        return Slice(view, effects, lambda state: pod_record(state, self._clock()))

    def apply(self, view: View, message: Message, effects: Effects) -> None:
        """Apply one message: a slice of its own, in one go.

        Args:
            view: the ``engine_blocks`` partition of the pod.
            message: from :func:`~kvatlas.streams.resolve.message.parse_message`.
            effects: gathers what is to be written elsewhere.
        """
        alone = self.slice(view, effects)
        try:
            for _ in self.steps(alone, message):
                pass
        finally:
            alone.finish()

    def steps(self, part: Slice, message: Message) -> Iterator[int]:
        """Apply one message of a slice, step by step.

        What cannot be applied goes to ``effects.dead``, event by event; nothing is raised for it. A message that was
        applied before, or is of an ended incarnation, changes nothing.

        Yields:
            The number of blocks that were looked at since the step before: others may have their turn here.
        """
        effects = part.effects
        effects.receive_ns = max(effects.receive_ns, message.receive_ns)
        try:
            if message.error:
                raise WireError(message.error)
            if message.content == topics.CONTENT_CONTROL:
                self._control(part, message)
            elif message.content in (topics.CONTENT_ENGINE, topics.CONTENT_KEYS):
                yield from self._stream(part, message)
            else:
                raise WireError(f"content type {message.content!r} is not known here")
        except WireError as error:
            part.bury(message, message.value, str(error))
            effects.counts["messages_dead"] += 1
        finally:
            part.end_message()

    # --- where the pod stands -------------------------------------------------------------------------------------

    def _control(self, part: Slice, message: Message) -> None:
        control = records.decode(records.Control, message.value)
        if control.type not in CONTROLS:
            raise WireError(f"control record of type {control.type!r}; known types: {', '.join(sorted(CONTROLS))}")
        if not 0 <= control.incarnation <= epochs.INCARNATION_MAX:
            raise WireError(f"control record of incarnation {control.incarnation}; expected 32 bits")
        effects, session = part.effects, part.session(message.pod)
        if session is not None and control.incarnation <= session.state.incarnation:
            effects.counts["controls_late"] += 1
            return
        if session is None:
            session = part.begin(message.pod)
        state = session.state
        effects.counts[f"control_{control.type}"] += 1
        self._raise_epoch(state, control.incarnation, 0, effects, gap=control.type == GAP)
        state.last_sequence = max(control.last_lost, ABSENT) if control.type == GAP else ABSENT
        state.state = records.GONE if control.type == GONE else records.LIVE
        if control.type == GAP:
            note_lost(state, control.first_lost, control.last_lost)
        self._describe(state, message)
        part.changed(session, message)

    def _raise_epoch(self, state: PodState, incarnation: int, clears: int, effects: Effects, *, gap: bool) -> None:
        """Begin an epoch. After a gap older entries are suspect (or gone, when gaps are strict), else they are gone."""
        first = state.incarnation == 0 and state.last_sequence == ABSENT
        state.incarnation, state.clears = incarnation, clears
        if gap:
            state.suspect_before = state.epoch
        if not gap or self._options.strict_gaps or first:
            state.valid_from = state.epoch
            self._drop_orphans(state, effects)
        effects.urgent = True
        effects.counts["epochs_raised"] += 1

    def _drop_orphans(self, state: PodState, effects: Effects) -> None:
        effects.counts["orphans_dropped"] += state.orphans
        state.orphans = 0
        state.orphans_since = state.epoch

    def _describe(self, state: PodState, message: Message) -> None:
        state.model = message.model or state.model
        state.engine = message.engine or state.engine
        state.store = message.store or state.store
        state.blocks_per_chunk = message.blocks_per_chunk
        state.computes_again = message.computes_again

    def _admit(self, part: Slice, message: Message) -> PodSession | None:
        """Return the pod that a message goes on with; None when it was applied before or came too late."""
        effects, incarnation, session = part.effects, message.incarnation, part.session(message.pod)
        if session is None:
            session = part.begin(message.pod)
            self._raise_epoch(session.state, max(incarnation, 0), 0, effects, gap=False)
        state = session.state
        if incarnation > state.incarnation:
            # Its control record was lost with the log's retention: nothing older can be trusted.
            self._raise_epoch(state, incarnation, 0, effects, gap=False)
            state.last_sequence = ABSENT
        elif incarnation not in (ABSENT, state.incarnation):
            effects.counts["messages_late"] += 1
            return None
        elif message.sequence <= state.last_sequence:
            effects.counts["messages_repeated"] += 1
            return None
        elif state.last_sequence != ABSENT and message.sequence > state.last_sequence + 1:
            note_lost(state, state.last_sequence + 1, message.sequence - 1)
            effects.counts["holes"] += 1
            self._raise_epoch(state, state.incarnation, state.clears + 1, effects, gap=True)
        state.state = records.LIVE
        state.last_sequence = message.sequence
        self._describe(state, message)
        return session

    # --- messages of the stream -----------------------------------------------------------------------------------

    def _stream(self, part: Slice, message: Message) -> Iterator[int]:
        session = self._admit(part, message)
        if session is None:
            return
        state, effects = session.state, part.effects
        # Also of a message that cannot be read: its sequence is taken, so the next one leaves no hole.
        part.changed(session, message)
        effects.counts["messages"] += 1
        updates = effects.of(session.number, state.epoch, message.sequence)
        blocks = self._blocks(part, session, message, updates)
        try:
            if message.content == topics.CONTENT_KEYS:
                yield from self._keyed_batch(part, message, state, blocks)
            else:
                yield from self._batch(part, message, state, blocks)
        except LimitError:
            # What it said is lost: older entries may be wrong from here on, as behind a lost message.
            note_lost(state, message.sequence, message.sequence)
            self._raise_epoch(state, state.incarnation, state.clears + 1, effects, gap=True)
            raise
        finally:
            updates.epoch = state.epoch

    def _blocks(self, part: Slice, session: PodSession, message: Message, updates: PodUpdates) -> PodBlocks:
        state, options = session.state, self._options
        store_ref = pod_ids.store_ref(state.store or options.store)
        announcements = message.announcements or options.announcements
        blocks = session.blocks
        if blocks is None:
            limits = BlockLimits(options.block_size_tokens, options.orphan_blocks)
            blocks = session.blocks = PodBlocks(
                part.view, session.number, state, updates, part.effects.counts, limits=limits
            )
        blocks.begin(updates, store_ref=store_ref, announcements=announcements)
        return blocks

    def _batch(self, part: Slice, message: Message, state: PodState, blocks: PodBlocks) -> Iterator[int]:
        batch = adapter(message.engine)(message.value, self._options.limits)
        state.last_event_ns = nanoseconds(batch.timestamp)
        state.dp_rank = batch.dp_rank or 0
        effects = part.effects
        for rejected in batch.rejected:
            part.bury(message, rejected.raw, rejected.reason)
        effects.counts["events_dead"] += len(batch.rejected)
        for planned, size in planned_parts(batch.events, blocks):
            part.view.prefetch(wanted_keys(planned, blocks))
            for event, table_keys, whole, follower, goes_on in planned:
                if isinstance(whole, Stored) and whole.parent is None:
                    blocks.recognise(whole, table_keys, follower)
                report = blocks.report
                try:
                    self._event(event, table_keys, state, blocks, effects)
                except WireError as error:
                    effects.counts["events_dead"] += 1
                    part.bury(message, raw_event(event), f"{type(error).__name__}: {error}")
                blocks.report = report and goes_on
            yield size
        blocks.finish()

    def _event(
        self, event: Event, table_keys: list[bytes], state: PodState, blocks: PodBlocks, effects: Effects
    ) -> None:
        if isinstance(event, Stored):
            effects.counts["blocks_stored"] += len(event.keys)
            if event.session:
                effects.sessions[event.session] = Sighting(state.pod, state.receive_ns)
            if event.tier == Tier.SHARED and not state.store:
                state.store = self._options.store
            note_names(state, event, effects)
            before = blocks.again
            blocks.stored(event, table_keys, self._root(state.model, event))
            again = blocks.again - before
            if again or event.unnamed:
                note_limits(state, event, effects, again=again)
        elif isinstance(event, Removed):
            effects.counts["blocks_removed"] += len(event.keys)
            blocks.removed(event, table_keys)
        else:
            self._clear(state, blocks, effects)

    def _clear(self, state: PodState, blocks: PodBlocks, effects: Effects) -> None:
        effects.counts["clears"] += 1
        effects.counts["epochs_raised"] += 1
        effects.urgent = True
        state.clears += 1
        clears = self._options.clears
        if clears == "gpu" or (clears == "engine" and state.engine not in CLEARS_HOST):
            state.gpu_valid_from = state.epoch
        else:
            state.valid_from = state.epoch
        self._drop_orphans(state, effects)
        blocks.epoch_rose()

    def _root(self, model: str, event: Stored) -> bytes:
        name = (model, event.lora, event.cache_salt if event.context is None else event.context.cache_salt)
        root = self._roots.get(name)
        if root is None:
            if len(self._roots) >= _ROOTS:
                self._roots.clear()  # salts come and go; a root is cheap to make again
            root = self._roots[name] = root_key(*name)
        return root

    def _keyed_batch(self, part: Slice, message: Message, state: PodState, blocks: PodBlocks) -> Iterator[int]:
        batch = records.decode(records.KeyedBatch, message.value)
        state.last_event_ns = nanoseconds(batch.timestamp)
        state.dp_rank = batch.dp_rank or 0
        effects, limits = part.effects, self._options.limits
        check_stripped(batch.events, limits)
        for whole in batch.events:
            for event in stripped_parts(whole, PART_BLOCKS):
                try:
                    self._keyed_event(part.view, event, state, blocks, effects)
                except (WireError, ValueError, OverflowError) as error:
                    effects.counts["events_dead"] += 1
                    part.bury(message, raw_event(event), f"{type(error).__name__}: {error}")
                yield 1 if isinstance(event, records.KeyedCleared) else len(event.engine_keys)

    def _keyed_event(self, view: View, event: KeyedEvent, state: PodState, blocks: PodBlocks, effects: Effects) -> None:
        if isinstance(event, records.KeyedCleared):
            self._clear(state, blocks, effects)
            return
        if not 0 <= event.group <= self._options.limits.group_max:
            raise WireError(f"group is {event.group}; expected 0 to {self._options.limits.group_max}")
        if isinstance(event, records.KeyedRemoved):
            removed = removed_of(event)
            self._event(removed, blocks.table_keys(removed), state, blocks, effects)
            return
        stored, keys, names = stored_of(event)
        note_stripped(state, event, effects)
        if not keys:
            # Without keys and without tokens: known blocks gain a tier, unknown ones stay unknown.
            self._event(stored, _EMPTY, state, blocks, effects)
            return
        effects.counts["blocks_stored"] += len(stored.keys)
        if stored.session:
            effects.sessions[stored.session] = Sighting(state.pod, state.receive_ns)
        if stored.tier == Tier.SHARED and not state.store:
            state.store = self._options.store
        table_keys = blocks.table_keys(stored)
        view.prefetch(table_keys)
        blocks.keyed(stored, table_keys, keys, names)


def pod_record(state: PodState, now_ns: int) -> records.PodRecord:
    """Return what ``kv-pods`` is told of a pod by the resolve agent."""
    main = state.groups.get(0) or next(iter(state.groups.values()), records.GroupSpec())
    return records.PodRecord(
        pod=state.pod,
        writer=pod_ids.WRITER_STREAMS,
        state=state.state,
        epoch=state.epoch,
        valid_from=state.valid_from,
        gpu_valid_from=state.gpu_valid_from,
        suspect_before=state.suspect_before,
        model=state.model,
        engine=state.engine,
        block_size_tokens=main.block_size_tokens,
        dp_rank=state.dp_rank,
        last_sequence=state.last_sequence,
        last_event_ns=state.last_event_ns,
        receive_ns=state.receive_ns,
        first_lost=state.first_lost,
        last_lost=state.last_lost,
        lost=state.lost,
        groups=dict(state.groups),
        store=state.store,
        pairs=state.pairs,
        named=state.named,
        chunk_tokens=state.blocks_per_chunk * main.block_size_tokens or state.chunk_tokens,
        events_partition=state.events_partition,
        events_offset=state.events_offset,
        updated_ns=now_ns,
        adapters=list(state.adapters),
        computes_again=state.computes_again,
    )
