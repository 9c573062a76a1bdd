"""Values that go in and out of tokenization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt


class Place(NamedTuple):
    """Where a multimodal item lies in a finished prompt.

    Attributes:
        identifier: the engine's name of the item, its hash or what the client calls it.
        offset: first token of its placeholder.
        length: tokens of its placeholder.
    """

    identifier: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is cut.

    Attributes:
        tokens: most tokens to keep, special tokens included.
        side: the end that is cut, by a plain slice of the finished token ids, as vLLM does when a request names the
            side. ``None`` keeps the end, as models that generate do, and the special tokens that the tokenizer adds.
    """

    tokens: int
    side: Literal["left", "right"] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one prompt.

    Attributes:
        ids: token ids, packed little-endian u32.
        backend: which backend answered: ``local``, ``hub`` or ``remote``.
        offsets: start and end of each token in the text, in characters, or ``None`` when not asked for.
        known_chars: characters of the text whose tokens were known before (prefix cache).
    """

    ids: bytes
    backend: str = ""
    offsets: Sequence[tuple[int, int]] | None = None
    known_chars: int = 0

    def __len__(self) -> int:
        return len(self.ids) // 4

    def array(self) -> npt.NDArray[np.uint32]:
        """Return the ids as an array that shares their memory."""
        return np.frombuffer(self.ids, dtype="<u4")

    def list(self) -> list[int]:
        """Return the ids as Python integers."""
        found: list[int] = self.array().tolist()
        return found


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A chat as the OpenAI API gives it, and how to render it.

    Attributes:
        messages: ``role``, ``content`` (text, list of parts, or None), ``tool_calls``, ``tool_call_id``, ``name`` and
            whatever else the template may read.
        tools: tools as the request has them, or None for no tools at all.
        documents: documents with ``title`` and ``text``, or None.
        chat_template: template text, or the name of one of the model's templates; None takes the model's own.
        add_generation_prompt: end with the beginning of an assistant message.
        continue_final_message: end inside the last message, so that it is continued.
        kwargs: further variables of the template, such as ``enable_thinking``; null and the text ``auto`` count as
            absent.
        reasoning_effort: how much the model is to think; it also sets ``enable_thinking`` where ``kwargs`` do not.
        add_special_tokens: put the tokenizer's own special tokens around the rendered text too.
        tool_choice: ``none``, ``auto``, ``required``, ``named``, or empty where the request leaves it open.
        responses: it came as a request of the Responses API.
        systems_first: put all system messages in front where the template refuses them anywhere else.
        places: places of multimodal items in the finished prompt, by offset, one for each in the messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_special_tokens: bool = False
    tool_choice: str = ""
    responses: bool = False
    systems_first: bool = False
    places: Sequence[Place] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text, and which backend rendered it."""

    text: str
    backend: str = ""


def cut(ids: bytes, truncation: Truncation | None) -> bytes:
    """Return packed token ids that were given as they are, cut to their end (or as the truncation says)."""
    if truncation is None or len(ids) <= truncation.tokens * 4:
        return ids
    kept = truncation.tokens * 4
    return ids[:kept] if truncation.side == "right" else ids[len(ids) - kept :]
