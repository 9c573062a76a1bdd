"""TensorRT-LLM's events, as its streaming publisher of KV cache manager V2 sends them.

Frames, batch and maps are vLLM's of 0.24 on. ``token_ids`` may hold text in place of a picture's tokens, which
stands for an id above 32 bits here; ``mm_keys`` lists per block what pictures are in it. An adapter has a number and no
name.
Salts are not told, nor are tiers but the GPU, resets, and groups of layers but the one with the largest window.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import xxhash

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.adapters.fields import (
    ClearedArray,
    ClearedMap,
    Format,
    Named,
    RemovedArray,
    RemovedMap,
    StoredFields,
    decode_batch,
)
from kvatlas.bridge.model.block_key import ExtraKey
from kvatlas.bridge.model.events import Batch, Limits

NAME: Final = "tensorrt-llm"
_ID_DIGITS: Final = 9
_WIDE: Final = 1 << 63


class TensorrtStored(StoredFields, gc=False, frozen=True, tag="BlockStored"):
    """BlockStored: a map, as every event is."""

    token_ids: list[int | str]  # type: ignore[assignment]
    mm_keys: Any = None

    def __post_init__(self) -> None:
        """Put an id in place of each token that is text."""
        if any(isinstance(token, str) for token in self.token_ids):
            msgspec.structs.force_setattr(self, "token_ids", [_token(token) for token in self.token_ids])


def decode(payload: bytes, limits: Limits) -> Batch:
    """Decode one message of TensorRT-LLM.

    Raises:
        WireError: the payload is not a batch.
    """
    return decode_batch(payload, limits, _FORMAT)


def _token(token: int | str) -> int:
    """Return a token's id; text that is no number of one stands for an id that no text has."""
    if isinstance(token, int):
        return token
    if token.isascii() and token.isdecimal() and len(token) <= _ID_DIGITS:
        return int(token)
    return xxhash.xxh3_64_intdigest(token.encode()) | _WIDE


def _names(fields: TensorrtStored) -> Named:
    lora = fields.lora_name or (f"lora:{fields.lora_id}" if fields.lora_id else None)
    blocks = fields.mm_keys
    if not blocks or not any(blocks):
        return lora, None, []
    if not isinstance(blocks, list) or len(blocks) != len(fields.block_hashes):
        raise WireError(f"mm_keys has not one entry for each of {len(fields.block_hashes)} block hashes")
    return lora, None, [[_picture(key) for key in block or ()] for block in blocks]


def _picture(key: Any) -> ExtraKey:
    if not isinstance(key, dict):
        raise WireError("mm_keys: expected maps")
    return ("raw", [str(key.get("hash")), key.get("start_offset")])


_FORMAT: Final = Format(
    array=msgspec.msgpack.Decoder(RemovedArray | ClearedArray),
    map=msgspec.msgpack.Decoder(TensorrtStored | RemovedMap | ClearedMap),
    names=_names,
)
