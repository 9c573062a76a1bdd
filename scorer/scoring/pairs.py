"""Lookups for engines whose cache is keyed by pairs of tokens (speculative decoding in SGLang).

Such an engine holds a block only for prompts that go on with the same token, so the index knows its blocks by another
name, made of the block's key and that token. A prompt is then looked up under both names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvatlas.bridge.model.block_key import ahead_keys
from kvatlas.scorer.scoring.fleet import Fleet
from kvatlas.scorer.scoring.lookup import Answers, Lookups


class PairedLookups:
    """Lookups that add to a block's value what is known of it together with the token behind it."""

    def __init__(self, lookups: Lookups, names: Mapping[bytes, bytes]) -> None:
        """Take where to look, and block key -> its name with the token behind it."""
        self._lookups = lookups
        self._names = names

    @property
    def first_blocks(self) -> int:
        """As of the lookups beneath."""
        return self._lookups.first_blocks

    @property
    def stale(self) -> bool:
        """As of the lookups beneath."""
        return self._lookups.stale

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Look keys up under both names; see :class:`~kvatlas.scorer.scoring.lookup.Lookups`."""
        named = [number for number, key in enumerate(keys) if key in self._names]
        answers = await self._lookups.lookup([*keys, *(self._names[keys[number]] for number in named)], deadline)
        values = list(answers.values[: len(keys)])
        for number, more in zip(named, answers.values[len(keys) :], strict=True):
            value = values[number]
            values[number] = None if value is None or more is None else value + more
        return Answers(values, answers.partitions)


def paired(lookups: Lookups, fleet: Fleet, model: str, keys: Sequence[bytes], packed: bytes) -> Lookups:
    """Return lookups that find a prompt on every pod of a model; the same ones where none is keyed by pairs.

    Args:
        lookups: where to look.
        fleet: the pods.
        model: the prompt's model.
        keys: its block keys.
        packed: its tokens, packed.
    """
    if not fleet.pairs(model):
        return lookups
    names = ahead_keys(keys, packed, fleet.block_size_tokens)
    return PairedLookups(lookups, dict(zip(keys, names, strict=False)))
