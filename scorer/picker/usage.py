"""What an engine says of a request in its answer: cached tokens, prompt tokens. Reads JSON and event streams. Pure.

An answer comes in pieces that are cut anywhere: of an event stream what follows the last line end is kept for the
next piece, and only events that name ``usage`` are decoded; a JSON answer is gathered up to a limit and decoded at its
end. What is absent is not zero: engines tell cached tokens only when asked to.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

_DATA: Final = b"data:"
_USAGE: Final = b'"usage"'
_DONE: Final = b"[DONE]"


class Usage(NamedTuple):
    """An engine's word; -1 where it says nothing."""

    prompt_tokens: int = -1
    cached_tokens: int = -1
    output_tokens: int = -1


class UsageReader:
    """Reads the usage out of an answer.

    Args:
        kind: its content type.
        most_bytes: longest JSON answer, and longest line of an event stream, that is kept.

    Attributes:
        usage: what was found so far.
        begun: whether the answer's content has begun: a first event, or a JSON answer's first piece.
    """

    def __init__(self, kind: str, most_bytes: int = 4 * 1024 * 1024) -> None:
        self.usage = Usage()
        self.begun = False
        self._events = kind.startswith("text/event-stream")
        self._json = kind.startswith("application/json")
        self._most = most_bytes
        self._kept = b""
        self._over = False

    @property
    def streamed(self) -> bool:
        """Whether the answer is an event stream."""
        return self._events

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        if self._events:
            self._feed_events(data)
        elif self._json and not self._over:
            self.begun = self.begun or bool(data)
            if len(self._kept) + len(data) > self._most:
                self._over, self._kept = True, b""
            else:
                self._kept += data

    def _feed_events(self, data: bytes) -> None:
        if not self.begun and _DATA in data:
            self.begun = True
        kept = self._kept + data if self._kept else data
        end = kept.rfind(b"\n")
        self._kept = kept[end + 1 :]
        if len(self._kept) > self._most:
            self._kept = b""
        if _USAGE not in kept:
            return
        for line in kept[: end + 1].splitlines():
            if line.startswith(_DATA) and _USAGE in line:
                self._decode(line[len(_DATA) :].strip())

    def close(self) -> Usage:
        """Take the end of the answer; returns what was found."""
        if self._events and self._kept.startswith(_DATA) and _USAGE in self._kept:
            self._decode(self._kept[len(_DATA) :].strip())
        elif self._json and self._kept:
            self._decode(self._kept)
        self._kept = b""
        return self.usage

    def _decode(self, text: bytes) -> None:
        if text == _DONE:
            return
        try:
            document = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return
        if isinstance(document, dict) and (found := usage_of(document)) is not None:
            # Streams may repeat it, and Anthropic's say the input first and the output last.
            self.usage = Usage(*(new if new >= 0 else old for new, old in zip(found, self.usage, strict=True)))


def usage_of(document: dict[str, Any]) -> Usage | None:
    """Return the usage in a decoded answer or event, None for none.

    Known are the chat and completions APIs (``prompt_tokens``), the responses API (``response.usage``,
    ``input_tokens``) and Anthropic's messages (``message.usage``, ``cache_read_input_tokens``).
    """
    usage = document.get("usage")
    for inside in ("response", "message"):
        if not isinstance(usage, dict) and isinstance(document.get(inside), dict):
            usage = document[inside].get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    if isinstance(details, dict):
        cached, prompt = _first_turn(details, "cached_tokens"), _first_turn(details, "input_tokens")
    else:
        cached = prompt = -1
    for name in ("prompt_tokens", "input_tokens"):
        if prompt < 0:
            prompt = _number(usage.get(name))
    if cached < 0 and prompt >= 0 and (read := _number(usage.get("cache_read_input_tokens"))) >= 0:
        # Anthropic's input tokens are those that were neither read from a cache nor written to one.
        cached = read
        prompt += read + max(_number(usage.get("cache_creation_input_tokens")), 0)
    output = _number(usage.get("completion_tokens"))
    return Usage(prompt, cached, output if output >= 0 else _number(usage.get("output_tokens")))


def _first_turn(details: dict[str, Any], name: str) -> int:
    """Return a count of the prompt that was sent: an engine that calls tools prompts itself again, and sums up."""
    turns = details.get(f"{name}_per_turn")
    return _number(turns[0] if isinstance(turns, list) and turns else details.get(name))


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else -1
