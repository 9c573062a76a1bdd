"""SGLang's events, from 0.5.12 on.

Arrays up to 0.5.19, of 5 elements and more for a stored block; 0.5.18 and 0.5.19 put a map behind the medium, at index
7, with the cache salt and in one build the session. Maps since 0.5.20, with ``cache_salt``, ``session_id`` and
``lora_name`` as fields of their own.
Salt and adapter stand on every event of a chain, on every tier.

With speculative decoding (EAGLE, NEXTN) ``token_ids`` is a list of overlapping pairs, see
:class:`kvatlas.bridge.model.events.Stored`. Pictures stand as token ids above 32 bits, made from their hash.

Extra keys of other builds are plain strings that separate caches; they carry no types, so each is kept verbatim in
its block's key.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

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
from kvatlas.bridge.model.events import Batch, Limits, Stored, Tier
from kvatlas.bridge.model.sessions import session_in

NAME: Final = "sglang"


class _SglangStored(StoredFields, gc=False, frozen=True):
    token_ids: list[int | list[int]]  # type: ignore[assignment]
    lora_name: Any = None

    @property
    def session(self) -> Any:
        """What the event says of its session, None for nothing."""
        more = self.lora_name
        return more.get("session_id") if isinstance(more, dict) else None

    @property
    def more(self) -> bool:
        """Tell whether a session is named."""
        return bool(self.session)


class SglangStoredArray(_SglangStored, gc=False, frozen=True, array_like=True, tag="BlockStored"):
    """BlockStored as an array; index 7 may be a map of what later versions have as fields."""


class SglangStoredMap(_SglangStored, gc=False, frozen=True, tag="BlockStored"):
    """BlockStored as a map."""

    cache_salt: str | None = None
    session_id: Any = None

    @property
    def session(self) -> Any:
        """What the event says of its session, None for nothing."""
        return self.session_id


def decode(payload: bytes, limits: Limits) -> Batch:
    """Decode one SGLang message.

    Raises:
        WireError: the payload is not a batch.
    """
    return decode_batch(payload, limits, _FORMAT)


def _names(fields: _SglangStored) -> Named:
    more: Any = fields.lora_name
    lora: str | None = _text(more)
    salt: str | None = None
    if isinstance(more, dict):
        lora, salt = _text(more.get("lora_name")), _text(more.get("cache_salt"))
    if isinstance(fields, SglangStoredMap):
        salt = fields.cache_salt
    if lora is None and fields.lora_id:
        lora = f"lora:{fields.lora_id}"
    return lora or None, salt or None, _extra(fields, lora)


def _extra(fields: _SglangStored, lora: str | None) -> list[list[ExtraKey]]:
    values = fields.extra_keys
    if not values or not any(values):
        return []
    if len(values) != len(fields.block_hashes):
        raise WireError(f"extra_keys has {len(values)} entries for {len(fields.block_hashes)} block hashes")
    return [[("raw", value) for value in entry or () if value != lora] for entry in values]


def _finish(fields: _SglangStored, stored: Stored, _limits: Limits) -> Stored:
    if stored.tier is not Tier.GPU:
        return stored
    return msgspec.structs.replace(stored, session=session_in(fields.session))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_FORMAT: Final = Format(
    array=msgspec.msgpack.Decoder(SglangStoredArray | RemovedArray | ClearedArray),
    map=msgspec.msgpack.Decoder(SglangStoredMap | RemovedMap | ClearedMap),
    names=_names,
    finish=_finish,
)
