"""Pictures, sounds and videos in chats: one placeholder in the rendered text becomes as many tokens as the item has.

How many that are and how the item is called, only the engine's processor can tell. So a chat with such items is taken
together with their places in the finished prompt (``multimodal``, as vLLM's ``.../render`` tells them), and the single
placeholder token that the template writes is repeated to each place's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.messages import is_media
from kvatlas.scorer.tokenization.records import ChatInput

_LONGEST: Final = 4 * 2**20


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat has items that are not text."""
    return any(_media(messages))


def widened(ids: bytes, chat: ChatInput, is_placeholder: Callable[[int], bool]) -> bytes:
    """Return the token ids of a chat with every item's placeholder repeated to its length.

    Args:
        ids: the chat as rendered, with one token for each item.
        chat: its places are those of the finished prompt.
        is_placeholder: whether a token can stand for an item.

    Raises:
        TokenizeInputError: the places are missing, or do not fit what the template wrote.
    """
    items = sum(1 for _ in _media(chat.messages))
    if len(chat.places) != items:
        raise TokenizeInputError(
            f"the chat has {items} pictures, sounds or videos and multimodal has {len(chat.places)} places: how many "
            f"tokens each takes is known to the engine alone; give identifier, offset and length of each in "
            f"multimodal, or send the answer of the engine's render endpoint"
        )
    if sum(place.length for place in chat.places) > _LONGEST:
        raise TokenizeInputError(f"multimodal: the items are longer than {_LONGEST} tokens together")
    found = bytearray()
    at = 0
    for number, place in enumerate(chat.places):
        keep = place.offset * TOKEN_BYTES - len(found)
        token = ids[at + keep : at + keep + TOKEN_BYTES] if keep >= 0 else b""
        if len(token) < TOKEN_BYTES or not is_placeholder(int.from_bytes(token, "little")):
            raise TokenizeInputError(
                f"multimodal[{number}]: at offset {place.offset} the prompt has no placeholder of an item"
            )
        found += ids[at : at + keep] + token * place.length
        at += keep + TOKEN_BYTES
    return bytes(found + ids[at:])


def _media(messages: Sequence[Mapping[str, Any]]) -> Any:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if is_media(part))
