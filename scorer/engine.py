"""From a request to scores: tokens, block keys, lookups, walk. Knows the parts, not the wire they came over."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge import block_key
from kvatlas.bridge.records import PodRecord
from kvatlas.scorer.errors import InputError, NotReadyError, TooLargeError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.pods import PodTable
from kvatlas.scorer.reader import Lookups, Seen
from kvatlas.scorer.score import Match, Walk, Weights, blocks_to_ask

_GROWTH: Final = 4

#: Keys and their values as looked up -> the same values with what is known besides the index.
Overlay = Callable[[Sequence[bytes], list[bytes | None]], list[bytes | None]]


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be scored, tokens known.

    Attributes:
        model: model name, part of every block key.
        packed: token ids as little-endian u32.
        lora, cache_salt: as the request carries them; empty for none.
        pods: pod ids to consider; empty means all.
        multimodal: (identifier, offset, length) of each item, in tokens.
        usable_only: leave out the block of the last token, which engines compute again.
    """

    model: str
    packed: bytes
    lora: str = ""
    cache_salt: str = ""
    pods: tuple[str, ...] = ()
    multimodal: tuple[tuple[str, int, int], ...] = ()
    usable_only: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.packed) // block_key.TOKEN_BYTES


class Scored(NamedTuple):
    """An answer before it is put on a wire.

    Attributes:
        matches: pods with a match, best first.
        keys: the block keys that were made.
        values: holders per key as far as the walk asked; None where nobody answered.
        partial: a block that could have mattered was not answered.
        partitions: state of the partitions that were asked.
        stages_ms: milliseconds in keys, lookup and score.
    """

    matches: list[Match]
    keys: list[bytes]
    values: list[bytes | None]
    partial: bool
    partitions: dict[int, Seen]
    stages_ms: tuple[float, float, float]


def weights_of(settings: ScorerSettings, model: str) -> Weights:
    """Return the tier weights of a model: the settings', with what ``models`` changes for it.

    Raises:
        InputError: an entry of ``models`` is not MODEL:KEY=VALUE.
    """
    fields = {
        "gpu": settings.weight_gpu,
        "cpu": settings.weight_cpu,
        "disk": settings.weight_disk,
        "shared": settings.weight_shared,
        "unknown": settings.weight_unknown,
        "speculative": settings.weight_speculative,
        "suspect_factor": settings.suspect_factor,
    }
    for entry in settings.models:
        name, _, pairs = entry.rpartition(":")
        if name != model:
            continue
        for pair in pairs.split(","):
            key, _, value = pair.partition("=")
            try:
                if key in fields:
                    fields[key] = float(value)
            except ValueError as error:
                raise InputError(f"[scorer] models: {entry!r}: {value!r} is not a number") from error
    return Weights(**fields)


class Engine:
    """Scores prompts against whatever :class:`~kvatlas.scorer.reader.Lookups` it is given."""

    def __init__(
        self,
        settings: ScorerSettings,
        pods: PodTable,
        lookups: Lookups,
        block_size_tokens: int = 16,
        *,
        overlay: Overlay | None = None,
    ) -> None:
        self.settings = settings
        self.pods = pods
        self.lookups = lookups
        self.block_size_tokens = block_size_tokens
        self._overlay = overlay
        self._weights: dict[str, Weights] = {}

    def weights(self, model: str) -> Weights:
        """Return the weights of a model; remembered."""
        found = self._weights.get(model)
        if found is None:
            if len(self._weights) > 1_000:  # callers may invent models
                self._weights.clear()
            found = self._weights[model] = weights_of(self.settings, model)
        return found

    def keys(self, prompt: Prompt, *, all_blocks: bool = False) -> list[bytes]:
        """Return the block keys of a prompt's blocks that can matter, in order."""
        size = self.block_size_tokens
        count = blocks_to_ask(prompt.tokens, size, whole_prompt=all_blocks or not prompt.usable_only)
        extra = block_key.multimodal_extra(prompt.multimodal, size, count) if prompt.multimodal else None
        root = block_key.root_key(prompt.model, prompt.lora or None, prompt.cache_salt or None)
        packed = prompt.packed[: count * size * block_key.TOKEN_BYTES]
        return block_key.block_keys(root, packed, size, extra)

    async def score(self, prompt: Prompt, deadline: float | None = None, *, every_block: bool = False) -> Scored:
        """Score one prompt.

        Args:
            prompt: what to score.
            deadline: monotonic seconds until when lookups may take; None takes the setting.
            every_block: look up all blocks, also those that no pod can reach any more (for explaining).

        Raises:
            NotReadyError: no worker is known yet.
            TooLargeError: more tokens than the limit.
        """
        if prompt.tokens > self.settings.max_tokens:
            raise TooLargeError(f"{prompt.tokens} tokens are over the limit of {self.settings.max_tokens} (max_tokens)")
        why = self.lookups.unready()
        if why and self.settings.require_workers:
            raise NotReadyError(why)
        began = time.perf_counter()
        keys = self.keys(prompt)
        keyed = time.perf_counter()
        until = deadline if deadline is not None else time.monotonic() + self.settings.deadline_ms / 1000
        scene = self.pods.fleet.scene(prompt.model, self.weights(prompt.model))
        walk = Walk(scene, prompt.tokens, pods=prompt.pods, whole_prompt=not prompt.usable_only)
        values: list[bytes | None] = []
        partitions: dict[int, Seen] = {}
        looked = walked = 0.0
        step = self.settings.lookup_chunk_blocks
        at = 0
        more = True
        while at < len(keys) and (more or every_block):
            part = keys[at : at + step]
            mark = time.perf_counter()
            answers = await self.lookups.lookup(part, until)
            looked += time.perf_counter() - mark
            mark = time.perf_counter()
            partitions.update(answers.partitions)
            found = self._overlay(part, answers.values) if self._overlay else answers.values
            values += found
            if more:
                more = walk.feed(found)
            walked += time.perf_counter() - mark
            at += len(part)
            step = min(step * _GROWTH, self.settings.lookup_chunk_max_blocks)
        mark = time.perf_counter()
        matches = walk.matches()
        walked += time.perf_counter() - mark
        stages = ((keyed - began) * 1000, looked * 1000, walked * 1000)
        return Scored(matches, keys, values, walk.partial, partitions, stages)

    def pod_records(self, names: Collection[str]) -> Mapping[str, PodRecord]:
        """Return the merged records of pods by name; unknown names are left out."""
        merged = self.pods.merged
        return {name: merged[name] for name in names if name in merged}


def pack(tokens: Sequence[int]) -> bytes:
    """Pack token ids as little-endian u32.

    Raises:
        InputError: a token id is not between 0 and 2**32 - 1.
    """
    try:
        return block_key.pack_tokens(tokens)
    except (OverflowError, TypeError) as error:
        raise InputError(f"tokens: {error}; token ids are integers from 0 to 4294967295") from error
