"""What a pod's events show to be in use beyond tokens: salts, pictures, adapters, pairs.

It decides whether a block that tokens alone name may be believed.
"""

from __future__ import annotations

import math

from kvatlas.bridge.model import records
from kvatlas.bridge.model.events import Stored
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.engine_blocks import PodState


def note_names(state: PodState, event: Stored, effects: Effects) -> None:
    """Note what an event shows to be in use beyond tokens."""
    state.pairs = state.pairs or bool(event.ahead)
    if event.unnamed:
        _note(state, 0, event.bare, effects)
    elif event.cache_salt or event.extra or event.lora:
        salts, extras = eb.SALTS if event.cache_salt else 0, eb.EXTRAS if event.extra else 0
        _note(state, salts | extras | (eb.ADAPTERS if event.lora else 0), False, effects)


def note_stripped(state: PodState, event: records.KeyedStored, effects: Effects) -> None:
    """Note what a stripped event shows to be in use beyond tokens."""
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
