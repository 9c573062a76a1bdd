"""What a picker reads of a request's body beside its prompt: model, session, length; and a body with a peer source.

Nothing of a body ever goes into a log or an error's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.model.sessions import NAME_BYTES

_decode: Final = msgspec.json.Decoder().decode
_LONGEST_NAME: Final = 256
#: Characters of a session's name: all that an engine's event may say.
_LONGEST_SESSION: Final = NAME_BYTES
#: A model's or session's name in a body of very many values is not looked at beyond so many bytes.
_NAME_BYTES: Final = 8_192
#: Strings and containers of a body that is decoded at once; more hold the event loop. Numbers cost little.
_MARKS: Final = 200_000
#: A token is so many bytes of text, where nothing better is known.
_BYTES_PER_TOKEN: Final = 4


class Body(NamedTuple):
    """A decoded body.

    Attributes:
        document: the JSON object; None for one of so many values that it is to be read beside the event loop.
        model: as the client named it, empty for none and for what is no name.
        session: ``session_id`` of the body, empty for none.
        tokens_estimate: prompt tokens guessed from its size.
    """

    document: Mapping[str, Any] | None
    model: str
    session: str
    tokens_estimate: int


class _Names(msgspec.Struct):
    """What is read of a body of very many values, without making them."""

    model: msgspec.Raw = msgspec.Raw(b"null")
    session_id: msgspec.Raw = msgspec.Raw(b"null")


_decode_names: Final = msgspec.json.Decoder(_Names).decode


def read_body(data: bytes) -> Body | None:
    """Return a body, None for one that is no JSON object."""
    try:
        if _is_many(data):
            names = _decode_names(data)
            return _body(None, _value(names.model), _value(names.session_id), len(data) // _BYTES_PER_TOKEN)
        document = _decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    model, session = document.get("model"), document.get("session_id")
    ids = document.get("token_ids") or document.get("prompt")
    listed = isinstance(ids, list) and bool(ids) and isinstance(ids[0], int)
    estimate = len(ids) if listed and isinstance(ids, list) else len(data) // _BYTES_PER_TOKEN
    return _body(document, model, session, estimate)


def _body(document: Mapping[str, Any] | None, model: Any, session: Any, estimate: int) -> Body:
    return Body(
        document,
        model if isinstance(model, str) and len(model) <= _LONGEST_NAME else "",
        session[:_LONGEST_SESSION] if isinstance(session, str) else "",
        estimate,
    )


def _is_many(data: bytes) -> bool:
    """Tell whether a body may have so many values that making them would hold the event loop."""
    return len(data) > _MARKS and len(data) - len(data.translate(None, b'"[{')) > _MARKS


def _value(raw: msgspec.Raw) -> Any:
    return _decode(raw) if len(bytes(raw)) <= _NAME_BYTES else None


def with_source(document: Mapping[str, Any], host: str, port: int, request_id: str) -> bytes:
    """Return a body that names a pod to pull cached blocks from, as vLLM's p2p tier takes it.

    What the body says of transfers already stays. The pod is asked what it has, so a wrong guess costs a question.
    """
    before = document.get("kv_transfer_params")
    params = dict(before) if isinstance(before, dict) else {}
    params["remote_kv_source"] = {"kv_request_id": request_id, "remote_host": host, "remote_port": port}
    return msgspec.json.encode({**document, "kv_transfer_params": params})
