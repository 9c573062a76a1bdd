"""vLLM's events, every wire version from 0.9 on.

Arrays up to 0.23, maps with a ``type`` key since 0.24; the order of fields is in
:class:`kvatlas.bridge.model.adapters.fields.StoredFields`.

``extra_keys`` lists per block, untagged and in this order: the LoRA name (when ``lora_name`` is set), multimodal
items as ``[identifier, offset relative to the block]`` (a bare identifier in the first versions that had the field,
all of which send arrays), the cache salt (first block of a prompt only), digests of prompt embeddings as bytes. What
a value is follows from its type and place, never from what its text looks like: a salt may be any text.

Events of offloaded blocks never have ``extra_keys``: their tokens alone do not name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import LimitError, WireError
from kvatlas.bridge.model.adapters.fields import (
    ClearedArray,
    ClearedMap,
    ExtraValue,
    Format,
    HashValue,
    Named,
    RemovedArray,
    RemovedMap,
    StoredFields,
    decode_batch,
)
from kvatlas.bridge.model.block_key import ExtraKey, pack_tokens
from kvatlas.bridge.model.events import Batch, Context, Limits, Stored, Tier, engine_key
from kvatlas.bridge.model.sessions import session_in

NAME: Final = "vllm"
_PAIR: Final = 2


class VllmStoredArray(StoredFields, gc=False, frozen=True, array_like=True, tag="BlockStored"):
    """BlockStored as an array: the order of the fields is the wire order; extra elements are ignored."""


class VllmStoredMap(StoredFields, gc=False, frozen=True, tag="BlockStored"):
    """BlockStored as a map; only maps ever had the fields listed here."""

    ownership: str | None = None
    session_id: Any = None
    lookahead_token_ids: Any = None
    skipped_parent_block_hash: HashValue | None = None
    skipped_token_ids: list[int] | None = None
    skipped_extra_keys: list[ExtraValue] | None = None

    @property
    def more(self) -> bool:
        """Tell whether any of these fields says something."""
        return bool(self.session_id or self.ownership or self.lookahead_token_ids or self.skipped_token_ids)


def decode(payload: bytes, limits: Limits) -> Batch:
    """Decode one vLLM message.

    Raises:
        WireError: the payload is not a batch (its events are judged one by one and never raise).
    """
    return decode_batch(payload, limits, _FORMAT)


def _names(fields: StoredFields) -> Named:
    lora = fields.lora_name or (f"lora:{fields.lora_id}" if fields.lora_id else None)
    values = fields.extra_keys
    if not values or not any(values):
        return lora, None, []
    if len(values) != len(fields.block_hashes):
        raise WireError(f"extra_keys has {len(values)} entries for {len(fields.block_hashes)} block hashes")
    bare = isinstance(fields, VllmStoredArray)
    salt, extra = split_extra(values, fields.lora_name, begins=fields.parent_block_hash is None, bare_items=bare)
    return lora, salt, extra


def split_extra(
    values: Sequence[ExtraValue], lora_name: str | None, *, begins: bool, bare_items: bool = False
) -> tuple[str | None, list[list[ExtraKey]]]:
    """Tell the untagged extra keys of an event apart: (cache salt or None, typed extra keys per block).

    Args:
        values: one entry per block.
        lora_name: the event's adapter; its name leads each list and is part of the root, not of the block.
        begins: whether the first block is the first of a prompt, the only one that has a salt.
        bare_items: whether the engine may list a multimodal item by its identifier alone. It then also stands in the
            next block, which no salt does, unless the item ends in the first.
    """
    rests = [_without(entry or [], lora_name) for entry in values]
    salt: str | None = None
    if begins:
        text = [value for value in rests[0] if isinstance(value, str)]
        if text and not (bare_items and len(text) == 1 and len(rests) > 1 and text[0] in rests[1]):
            salt = text[-1]  # items come before the salt
            place = len(rests[0]) - 1 - rests[0][::-1].index(salt)
            rests[0] = [*rests[0][:place], *rests[0][place + 1 :]]
    extra = [[_typed(value) for value in rest] for rest in rests]
    return salt, extra if any(extra) else []


def _without(entry: list[Any], lora_name: str | None) -> list[Any]:
    return entry[1:] if lora_name and entry and entry[0] == lora_name else entry


def _typed(value: Any) -> ExtraKey:
    if isinstance(value, list) and len(value) == _PAIR and isinstance(value[0], str):
        return ("mm", value[0], value[1])
    return ("raw", value)


def _finish(fields: StoredFields, stored: Stored, limits: Limits) -> Stored:
    more: dict[str, Any] = {}
    if stored.tier != Tier.GPU and fields.extra_keys is None:
        more["unnamed"] = True
        more["bare"] = fields.group_idx is None
    if isinstance(fields, VllmStoredMap):
        if fields.lookahead_token_ids:
            more["lookahead"] = True
        if fields.ownership:
            more["ownership"] = fields.ownership
        if fields.session_id and stored.tier is Tier.GPU:
            more["session"] = session_in(fields.session_id)
        if fields.skipped_token_ids:
            more["context"] = _context(fields, fields.skipped_token_ids, limits)
    return msgspec.structs.replace(stored, **more)


def _context(fields: VllmStoredMap, token_ids: list[int], limits: Limits) -> Context | None:
    """Return the tokens between the last announced block and the parent, None when they are no whole blocks."""
    if len(token_ids) > limits.tokens_per_event:
        raise LimitError(f"context of {len(token_ids)} tokens is over the limit of {limits.tokens_per_event}")
    size = fields.block_size
    if size <= 0 or len(token_ids) % size:
        return None
    parent, values = fields.skipped_parent_block_hash, fields.skipped_extra_keys
    salt: str | None = None
    extra: list[list[ExtraKey]] = []
    if values and any(values):
        if len(values) != len(token_ids) // size:
            raise WireError(f"skipped_extra_keys has {len(values)} entries for {len(token_ids) // size} blocks")
        salt, extra = split_extra(values, fields.lora_name, begins=parent is None)
    return Context(
        parent=None if parent is None else engine_key(parent),
        tokens=pack_tokens(token_ids),
        extra=extra,
        cache_salt=salt,
    )


_FORMAT: Final = Format(
    array=msgspec.msgpack.Decoder(VllmStoredArray | RemovedArray | ClearedArray),
    map=msgspec.msgpack.Decoder(VllmStoredMap | RemovedMap | ClearedMap),
    names=_names,
    finish=_finish,
)
