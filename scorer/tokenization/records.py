"""Values that go in and out of tokenization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is cut.

    Attributes:
        tokens: most tokens to keep, special tokens included.
        side: the end that is cut, by a plain slice of the finished token ids, as vLLM does when a request names the
            side. ``None`` takes the tokenizer's own side and keeps the special tokens that the tokenizer adds.
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
        known_bytes: UTF-8 bytes of the text whose tokens were known before (prefix cache).
    """

    ids: bytes
    backend: str = ""
    offsets: Sequence[tuple[int, int]] | None = None
    known_bytes: int = 0

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
        tools: JSON schemas of tools, or None for no tools at all.
        documents: documents with ``title`` and ``text``, or None.
        chat_template: template text, or the name of one of the model's templates; None takes the model's own.
        add_generation_prompt: end with the beginning of an assistant message.
        continue_final_message: end inside the last message, so that it is continued.
        kwargs: further variables of the template, such as ``enable_thinking``.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text, and which backend rendered it."""

    text: str
    backend: str = ""
