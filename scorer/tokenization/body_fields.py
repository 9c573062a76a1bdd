"""Fields of a JSON request body, read with their names: every refusal says which field and what it should hold.

What the engine refuses is refused here as well, so that a prompt it will never see is not scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import Place, Truncation

#: What vLLM refuses in a salt, which becomes part of names of files and keys.
_SALT_REFUSED: Final = frozenset("@/\\\0")
_SALT_LONGEST: Final = 128
EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
_NAMES: Final = {str: "text", bool: "true or false", dict: "an object", list: "an array", int: "a whole number"}


def take(body: Mapping[str, Any], field: str, kind: type, where: str = "") -> Any:
    """Return a field's value, None when it is absent or null.

    Raises:
        TokenizeInputError: it is of another kind.
    """
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TokenizeInputError(f"{where}{field}: must be {_NAMES[kind]}, not {shown(value)}")
    return value


def need(body: Mapping[str, Any], field: str, kind: type, where: str = "") -> Any:
    """Return a field's value, which must be there.

    Raises:
        TokenizeInputError: it is missing, null or of another kind.
    """
    value = take(body, field, kind, where)
    if value is None:
        raise TokenizeInputError(f"{where}{field}: missing; must be {_NAMES[kind]}")
    return value


def objects(value: Sequence[Any], where: str) -> Sequence[Mapping[str, Any]]:
    """Return a list whose entries must be objects.

    Raises:
        TokenizeInputError: one is not.
    """
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise TokenizeInputError(f"{where}[{number}]: must be an object, not {shown(entry)}")
    return value


def texts(body: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Return a list of texts, empty when it is absent or null.

    Raises:
        TokenizeInputError: it is something else.
    """
    value = take(body, field, list) or ()
    for number, entry in enumerate(value):
        if not isinstance(entry, str):
            raise TokenizeInputError(f"{field}[{number}]: must be text, not {shown(entry)}")
    return tuple(value)


def choice(body: Mapping[str, Any], field: str, allowed: frozenset[str]) -> str | None:
    """Return one of some words, None when it is absent or null.

    Raises:
        TokenizeInputError: it is another.
    """
    value: str | None = take(body, field, str)
    if value is not None and value not in allowed:
        raise TokenizeInputError(f"{field}: {value[:40]!r} is none of {', '.join(sorted(allowed))}")
    return value


def salt_of(body: Mapping[str, Any]) -> str:
    """Return the cache salt, empty for none.

    Raises:
        TokenizeInputError: it is one that the engine refuses.
    """
    value: str | None = take(body, "cache_salt", str)
    if value is None:
        return ""
    if not value or len(value) > _SALT_LONGEST or _SALT_REFUSED & set(value):
        raise TokenizeInputError(
            f"cache_salt: 1 to {_SALT_LONGEST} characters without @, /, \\ and NUL are wanted, as the engine does"
        )
    return value


def truncation_of(body: Mapping[str, Any]) -> Truncation | None:
    """Return how the prompt is cut; -1, the model's own limit, is not known here and cuts nothing.

    Raises:
        TokenizeInputError: it makes no sense.
    """
    tokens: int | None = take(body, "truncate_prompt_tokens", int)
    side = choice(body, "truncation_side", frozenset({"left", "right"}))
    if tokens is None or tokens == -1:
        return None
    if tokens < 1:
        raise TokenizeInputError(f"truncate_prompt_tokens: a number from 1 on, or -1, is wanted, not {tokens}")
    return Truncation(tokens, side)  # type: ignore[arg-type]  # one of its two words


def packed(ids: Any, where: str) -> bytes:
    """Return token ids as little-endian u32.

    Raises:
        TokenizeInputError: they are not a list of whole numbers from 0 to 2^32 - 1.
    """
    try:
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise TypeError
        return pack_tokens(ids)
    except (TypeError, OverflowError) as error:
        raise TokenizeInputError(f"{where}: token ids are whole numbers from 0 to {2**32 - 1}") from error


def places_of(body: Mapping[str, Any]) -> tuple[Place, ...]:
    """Return the places of multimodal items that the body names (our own field ``multimodal``), in order.

    Raises:
        TokenizeInputError: an entry is not ``{"identifier", "offset", "length"}``.
    """
    entries = objects(take(body, "multimodal", list) or [], "multimodal")
    found = []
    for number, entry in enumerate(entries):
        where = f"multimodal[{number}]."
        identifier = need(entry, "identifier", str, where)
        found.append(_place(identifier, entry, where))
    return tuple(sorted(found, key=lambda place: place.offset))


def feature_places(features: Mapping[str, Any]) -> tuple[Place, ...]:
    """Return the places in the ``features`` of a vLLM render answer: ``mm_hashes`` and ``mm_placeholders`` by kind.

    Raises:
        TokenizeInputError: they do not fit together.
    """
    hashes = take(features, "mm_hashes", dict, "features.") or {}
    ranges = take(features, "mm_placeholders", dict, "features.") or {}
    found = []
    for kind in hashes.keys() | ranges.keys():
        names, places = hashes.get(kind), ranges.get(kind)
        if not isinstance(names, list) or not isinstance(places, list) or len(names) != len(places):
            raise TokenizeInputError(f"features: mm_hashes and mm_placeholders of {kind!r} do not fit together")
        for number, (name, place) in enumerate(zip(names, objects(places, "features.mm_placeholders"), strict=True)):
            if not isinstance(name, str):
                raise TokenizeInputError(f"features.mm_hashes.{kind}[{number}]: must be text, not {shown(name)}")
            found.append(_place(name, place, f"features.mm_placeholders.{kind}[{number}]."))
    return tuple(sorted(found, key=lambda place: place.offset))


def _place(identifier: str, entry: Mapping[str, Any], where: str) -> Place:
    offset, length = need(entry, "offset", int, where), need(entry, "length", int, where)
    if not identifier or not 0 <= offset < 2**32 or not 0 < length < 2**32:
        raise TokenizeInputError(f"{where[:-1]}: an identifier, an offset from 0 and a length from 1 are wanted")
    return Place(identifier, offset, length)


def shown(value: Any) -> str:
    """Return what a value is, for people."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = ((str, "text"), (dict, "an object"), (list, "an array"))
    return next((name for kind, name in names if isinstance(value, kind)), "a number")
