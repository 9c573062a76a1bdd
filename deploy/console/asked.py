"""What the page asks about a prompt, read no further than the console needs it: the prompt is for the scorer to read.

Token ids and bodies of engines go on to the scorer as they came, with its bounds on what they hold and its processes
beside its event loop; here the rest of a body is stepped over, which takes milliseconds for the largest.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS
from kvatlas.scorer.api.bounds import check_name, check_names
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.v1 import scorer_pb2 as pb

_ABSENT: Final = (b"", b"null")

_Name = Annotated[str, msgspec.Meta(min_length=1)]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question: token ids, or the body of a request to an engine with the page's own fields among its own.

    Attributes:
        at: the moment that is asked about, empty for now.
        session_id: whose session the picker reckons with.
        model, lora, cache_salt, pods: as a scorer's request has them.
        tokens, prompt, messages, input: JSON, as it came.
    """

    model: _Name
    at: str | None = None
    session_id: str | None = None
    lora: str | None = None
    cache_salt: str | None = None
    pods: list[str] | None = None
    tokens: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


def read(body: bytes) -> tuple[Asked, pb.ScoreRequest]:
    """Return what a body asks, and the scorer's request for it.

    Raises:
        InputError: it is no JSON object, a field is of another kind, or a name is too long.
    """
    try:
        asked = msgspec.json.decode(body, type=Asked)
        for name in ("model", "at", "session_id", "lora", "cache_salt"):
            check_name(getattr(asked, name) or "", name)
        check_names(asked.pods or (), len(asked.pods or ()), "pods")
        return asked, pb.ScoreRequest(request_json=_forwarded(asked, body).decode())
    except DECODE_ERRORS as error:
        raise InputError(f"body: {error}") from error


def _forwarded(asked: Asked, body: bytes) -> bytes:
    if _is_given(asked.tokens):
        beside = {"model": asked.model, "lora": asked.lora, "cache_salt": asked.cache_salt, "pods": asked.pods}
        named = msgspec.json.encode({name: value for name, value in beside.items() if value})
        return named[:-1] + b',"token_ids":' + bytes(asked.tokens) + b"}"
    if not any(map(_is_given, (asked.prompt, asked.messages, asked.input))):
        raise InputError("one of prompt, messages, input and tokens is needed")
    return body


def _is_given(value: msgspec.Raw) -> bool:
    return bytes(value) not in _ABSENT
