"""Score query: one prompt to be scored, as plain values, whichever API it came through; and its block keys. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.model.block_key import TOKEN_BYTES, block_keys, multimodal_extra, root_key
from kvatlas.scorer.errors import InputError, TooLargeError
from kvatlas.scorer.scoring.walk import blocks_to_ask

#: So often may multimodal items cover a prompt, on average: sound lies within video, nothing within a hundred items.
_DEEPEST: Final = 8

#: Multimodal item: (identifier, offset, length), in tokens of the prompt.
PlacedItem = tuple[str, int, int]


class PromptTokens(NamedTuple):
    """Token ids of a prompt.

    Attributes:
        packed: token ids as little-endian u32.
        tokenizer: backend that made them; empty when they were given.
        seconds: time that it took.
        wide: position -> whole id of the tokens above 32 bits, whose low halves are in ``packed``.
    """

    packed: bytes
    tokenizer: str = ""
    seconds: float = 0.0
    wide: Mapping[int, int] = MappingProxyType({})

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.packed) // TOKEN_BYTES


class ScoreQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked.

    Attributes:
        model: model name, part of every key.
        prompt: its tokens.
        lora: adapter name, empty for none.
        cache_salt: the request's salt, empty for none.
        items: multimodal items.
        pods: pod ids that may score; empty means all.
        strategy: how a match becomes a score; empty takes the model's setting.
        usable_only: leave out the block of the prompt's last token, which engines compute again.
    """

    model: str
    prompt: PromptTokens
    lora: str = ""
    cache_salt: str = ""
    items: Sequence[PlacedItem] = ()
    pods: Collection[str] = ()
    strategy: str = ""
    usable_only: bool = False


def keys_of(query: ScoreQuery, block_size_tokens: int, hashed: Callable[..., list[bytes]] = block_keys) -> list[bytes]:
    """Return the block keys that can matter to any pod, first block first; ``hashed`` is, or does as, ``block_keys``.

    Raises:
        InputError: no model, or a multimodal item lies outside the prompt.
        TooLargeError: the items overlap too much.
    """
    if not query.model:
        raise InputError("model: missing; block keys differ by model")
    prompt = query.prompt
    blocks = blocks_to_ask(prompt.tokens, block_size_tokens, whole_prompt=not query.usable_only)
    root = root_key(query.model, query.lora or None, query.cache_salt or None)
    extra = None
    if query.items:
        _check_items(query.items, prompt.tokens)
    if query.items or prompt.wide:
        extra = multimodal_extra(query.items, block_size_tokens, blocks, prompt.wide)
    return hashed(root, prompt.packed[: blocks * block_size_tokens * TOKEN_BYTES], block_size_tokens, extra)


def _check_items(items: Sequence[PlacedItem], tokens: int) -> None:
    for number, (identifier, offset, length) in enumerate(items):
        if not identifier or offset < 0 or length < 1 or offset + length > tokens:
            raise InputError(
                f"multimodal[{number}]: needs an identifier and a range inside the prompt of {tokens} tokens, "
                f"has offset {offset} and length {length}"
            )
    covered = sum(length for _, _, length in items)
    if covered > _DEEPEST * tokens:
        raise TooLargeError(
            f"multimodal: the items cover {covered} tokens of a prompt of {tokens}; they overlap too much"
        )
