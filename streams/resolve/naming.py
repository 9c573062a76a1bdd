"""What a pod's events show to be in use beyond tokens: salts, pictures, adapters, pairs; and what they cannot say.

It decides whether a block that tokens alone name may be believed, and what an operator should know of the pod.
"""

from __future__ import annotations

import math
from typing import Final

from kvatlas.bridge.model import records
from kvatlas.bridge.model.adapters import ADAPTER_IDS_HASHED, HASHES_HIDE_NAMES
from kvatlas.bridge.model.events import Stored
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.engine_blocks import PodState

#: Adapters of a pod that are remembered by name, and the longest such name.
_MOST_ADAPTERS: Final = 256
_ADAPTER_BYTES: Final = 1024


def note_names(state: PodState, event: Stored, effects: Effects) -> None:
    """Note what an event shows to be in use beyond tokens."""
    _note_adapter(state, event.lora, effects)
    state.pairs = state.pairs or bool(event.ahead)
    if event.unnamed:
        _note(state, 0, event.bare, effects)
    elif event.cache_salt or event.extra or event.lora:
        if event.lora and state.engine in ADAPTER_IDS_HASHED:
            state.aliasing = True
        salts, extras = eb.SALTS if event.cache_salt else 0, eb.EXTRAS if event.extra else 0
        _note(state, salts | extras | (eb.ADAPTERS if event.lora else 0), False, effects)


def note_stripped(state: PodState, event: records.KeyedStored, effects: Effects) -> None:
    """Note what a stripped event shows to be in use beyond tokens."""
    _note_adapter(state, event.lora, effects)
    state.pairs = state.pairs or bool(event.names)
    if event.unnamed:
        _note(state, 0, event.bare, effects)
    else:
        salts, extras = eb.SALTS if event.salted else 0, eb.EXTRAS if event.pictured else 0
        _note(state, salts | extras | (eb.ADAPTERS if event.adapted else 0), False, effects)
    if event.chunk_tokens > 0:
        state.chunk_tokens = math.gcd(state.chunk_tokens, event.chunk_tokens)


def _note(state: PodState, names: int, bare: bool, effects: Effects) -> None:
    was = state.named
    state.names |= names
    state.bare = state.bare or bare
    if state.named and not was:
        effects.urgent = True  # readers must know before they see what is stored from here on


def note_limits(state: PodState, event: Stored, effects: Effects, *, again: int) -> None:
    """Note what a store shows that its engine does not announce; the log is told of each once a pod.

    Args:
        state: the pod's state.
        event: the store, applied.
        effects: gathers counts and notices.
        again: blocks of it that were on that tier already.
    """
    if event.unnamed and not event.tokens and not state.blocks_per_chunk:
        effects.counts["placeholders_unsized"] += len(event.keys)
        if not state.chunk_tokens:
            _say(state, eb.UNSIZED, effects, _UNSIZED)
    if again and state.engine in HASHES_HIDE_NAMES:
        effects.counts["names_hidden"] += again
        _say(state, eb.HIDDEN, effects, _HIDDEN)
    if state.reports:
        _say(state, eb.REPORTS, effects, _REPORTS)


def _say(state: PodState, bit: int, effects: Effects, text: str) -> None:
    if not state.noticed & bit:
        state.noticed |= bit
        effects.notices.append((state.pod, text))


_UNSIZED: Final = (
    "offloaded blocks are announced by their keys alone; if the engine stores several blocks as one chunk, its offload "
    "tier counts only with blocks_per_chunk=N in the endpoint's options, or self-describing events of the engine"
)
_HIDDEN: Final = (
    "blocks are announced again that are there: salts, adapters or other cache keys are in use that this version of "
    "the engine does not publish, so its blocks score for prompts without them too"
)
_REPORTS: Final = "clients ask for full reports: what is announced again is not counted as another copy"


def _note_adapter(state: PodState, adapter: str | None, effects: Effects) -> None:
    """Keep the names of adapters, so that requests may name one as their model."""
    if not adapter or adapter in state.adapters or len(state.adapters) >= _MOST_ADAPTERS:
        return
    if len(adapter.encode(errors="replace")) <= _ADAPTER_BYTES:
        state.adapters = [*state.adapters, adapter]
        effects.urgent = True  # readers must know the name before they are asked by it
