"""SGLang's events: vLLM's array layout with 5 to 9 fields for a stored block, shorter ones padded by defaults.

SGLang's extra keys are plain strings that separate caches (LoRA, tenant); they carry no types, so each is kept
verbatim in its block's key.
"""

from __future__ import annotations

from typing import Any, Final

from kvatlas.bridge.model.adapters.fields import decode_batch
from kvatlas.bridge.model.block_key import ExtraKey
from kvatlas.bridge.model.events import Batch, Limits

NAME: Final = "sglang"


def decode(payload: bytes, limits: Limits) -> Batch:
    """Decode one SGLang message.

    Raises:
        WireError: the payload is not a batch.
    """
    return decode_batch(payload, limits, split_extra)


def split_extra(values: list[Any], lora_name: str | None, first: bool) -> tuple[str | None, list[ExtraKey]]:
    """Keep every extra key verbatim, but for the adapter's name, which the root carries."""
    del first
    return None, [("raw", value) for value in values if value != lora_name]
