"""vLLM's events, every wire version from 0.9 on.

Arrays up to 0.23, maps with a ``type`` key since 0.24; the order of fields is in
:class:`kvatlas.bridge.model.adapters.fields.StoredFields`.

``extra_keys`` lists per block, untagged and in this order: the LoRA name (when ``lora_name`` is set), multimodal
items as ``[identifier, offset relative to the block]`` (a bare identifier in early versions), the cache salt (first
block of a prompt only), digests of prompt embeddings as bytes.
"""

from __future__ import annotations

import re
from typing import Any, Final

from kvatlas.bridge.model.adapters.fields import decode_batch
from kvatlas.bridge.model.block_key import ExtraKey
from kvatlas.bridge.model.events import Batch, Limits

NAME: Final = "vllm"
#: Early versions list a multimodal identifier bare; those are hex digests, which salts in practice are not.
_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PAIR: Final = 2


def decode(payload: bytes, limits: Limits) -> Batch:
    """Decode one vLLM message.

    Raises:
        WireError: the payload is not a batch (its events are judged one by one and never raise).
    """
    return decode_batch(payload, limits, split_extra)


def split_extra(values: list[Any], lora_name: str | None, first: bool) -> tuple[str | None, list[ExtraKey]]:
    """Tell a block's untagged extra keys apart: (cache salt or None, typed extra keys).

    Args:
        values: the entry of one block.
        lora_name: the event's adapter; its name leads the list and is part of the root, not of the block.
        first: whether this is the first block of a prompt, the only one that carries a salt.
    """
    rest = values[1:] if lora_name and values and values[0] == lora_name else values
    salt: str | None = None
    typed: list[ExtraKey] = []
    for value in rest:
        if isinstance(value, list) and len(value) == _PAIR and isinstance(value[0], str):
            typed.append(("mm", value[0], value[1]))
        elif first and salt is None and isinstance(value, str) and not _HEX_DIGEST.fullmatch(value):
            salt = value
        else:
            typed.append(("raw", value))
    return salt, typed
