"""What is done beside the scorer: bytes in, bytes out, without state.

The answers of :func:`render` come from a process that ran a caller's template, so they are plain text; those of
:func:`read_body` come from our own code and carry values.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import DecodeError

from kvatlas.scorer.errors import InputError, TooLargeError
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.arguments import EngineArguments
from kvatlas.scorer.tokenization.body_fields import packed
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.limits import TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.records import ChatInput
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: Values of a JSON body beside its token ids: what is built of them is built in the scorer's own process again.
MOST_VALUES: Final = 200_000
#: Token ids up to this number are left to protobuf's reader, which knows more ways to write them.
_FEW: Final = 256
_OTHER_FORMS: Final = frozenset({"tokens_packed", "tokensPacked"})

T = TypeVar("T")


def render(payload: bytes) -> bytes:
    """Render a chat with its own template.

    Raises:
        InputError: as :meth:`~kvatlas.scorer.tokenization.chat.ChatRenderer.render`.
    """
    given = json.loads(payload)
    chat = ChatInput(**given["chat"])
    arguments = EngineArguments(**given["arguments"])
    renderer = ChatRenderer(
        TokenizerSettings(request_templates=True), datetime.now, limits=TokenizerLimits(**given["limits"])
    )
    templates = {"default": chat.chat_template or ""}
    text = renderer.render(replace(chat, chat_template=None), templates, given["special_tokens"], arguments)
    return text.encode("utf-8", "surrogatepass")


def read_body(payload: bytes) -> bytes:
    """Read a body of an engine's API: its shape, a line feed, then the JSON.

    Raises:
        InputError: it is none.
    """
    shape, _, body = payload.partition(b"\n")
    return pickle.dumps(read_json(shape.decode(), body))


def read_json(shape: str, body: bytes) -> list[requests.EngineRequest]:
    """Return the prompts of a body of an engine's API; an empty shape is told by the body's fields.

    Raises:
        InputError: it is none.
    """
    value = translated(_json, body)
    found = requests.read(shape or requests.shape_of_body(value), value)  # type: ignore[arg-type]  # checked by callers
    for one in found:
        if one.chat is not None:
            count_values(one.chat.messages, one.chat.tools, one.chat.documents, one.chat.kwargs)
    return found


def count_values(*values: Any) -> None:
    """Refuse more values than may be built again.

    Raises:
        TooLargeError: there are more.
    """
    waiting = list(values)
    count = 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count + len(waiting) > MOST_VALUES:
            raise TooLargeError(f"body: more than {MOST_VALUES} JSON values beside the token ids")
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def read_message(payload: bytes) -> bytes:
    """Read the JSON or binary form of one of our own messages, and return its binary form.

    The payload is the message's name, a blank, ``json`` or ``binary``, a line feed, then the message.

    Raises:
        InputError: it is no such message.
    """
    head, _, data = payload.partition(b"\n")
    name, _, form = head.decode().partition(" ")
    message = getattr(pb, name)()
    parse_message(data, message, form)
    return bytes(message.SerializeToString())


def parse_message(data: bytes, message: Any, form: str) -> None:
    """Fill a message from its JSON or binary form.

    Raises:
        InputError: it is no such message.
    """
    if form == "json":
        translated(_parse_json, data, message)
    else:
        translated(message.MergeFromString, data)


def translated(parse: Callable[..., T], *given: Any) -> T:
    """Call a parser; what it says against the bytes is an error of ours.

    Raises:
        InputError: it refuses them.
    """
    try:
        return parse(*given)
    except UnicodeDecodeError as error:
        raise InputError(f"body: not UTF-8 at byte {error.start}") from error
    except (ParseError, DecodeError, ValueError, RecursionError) as error:
        raise InputError(f"body: {error}") from error


def _json(data: bytes) -> Any:
    """Decode JSON; unlike Python's own reader this one refuses halves of surrogate pairs, which are no text."""
    text = data.decode()
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: not JSON: {error}") from error


def _parse_json(data: bytes, message: Any) -> None:
    value = _json(data)
    if not isinstance(value, dict):
        raise InputError("body: a JSON object is wanted")
    taken = list(_take_tokens(value))
    count_values(value)
    ParseDict(value, message)
    for path, tokens in taken:
        target = message
        for step in path:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        target.tokens_packed = tokens


def _take_tokens(value: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], bytes]]:
    """Take long token ids out of a request in JSON: protobuf's reader looks at them one by one, for seconds."""
    inner: list[tuple[tuple[str | int, ...], Any]] = [((), value), (("request",), value.get("request"))]
    several = value.get("requests")
    if isinstance(several, list):
        inner += [(("requests", number), one) for number, one in enumerate(several)]
    for path, one in inner:
        if not isinstance(one, dict):
            continue
        tokens = one.get("tokens")
        if isinstance(tokens, list) and len(tokens) > _FEW and not one.keys() & _OTHER_FORMS:
            yield path, packed(tokens, ".".join(map(str, (*path, "tokens"))))
            del one["tokens"]
