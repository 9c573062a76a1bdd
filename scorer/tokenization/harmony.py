"""Harmony, the format of gpt-oss chats, rendered with the ``openai_harmony`` library as vLLM renders it.

The system text carries the date of the engine's start of the conversation: its day, unless the engine pins it
(``VLLM_SYSTEM_START_DATE``), which the setting ``harmony_date`` repeats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput

_EFFORTS: Final = ("high", "medium", "low")


class HarmonyRenderer:
    """Renders chats to token ids; safe to use from many threads."""

    def __init__(self, date: str, now: Callable[[], datetime]) -> None:
        """Take the date of the system text, empty for the day of the rendering."""
        self._date = date
        self._now = now

    def encode(self, chat: ChatInput, effort: str | None, *, with_tools: bool) -> bytes:
        """Return the token ids of a chat, packed little-endian u32.

        Args:
            chat: messages as the request has them, checked.
            effort: reasoning effort, None for the format's default.
            with_tools: show the chat's tools.

        Raises:
            TokenizeInputError: the chat cannot be rendered so, or the library or its vocabulary is not there.
        """
        if chat.responses:
            raise TokenizeInputError("requests of the Responses API to gpt_oss models are rendered by the engine alone")
        if effort is not None and effort not in _EFFORTS:
            raise TokenizeInputError(f"reasoning_effort: Harmony knows {', '.join(_EFFORTS)}, not {effort}")
        encoding = _encoding()
        made = _Messages(self._date or self._now().strftime("%Y-%m-%d"))
        rest = made.preamble(chat, effort, with_tools=with_tools)
        for message in rest:
            made.add(message)
        ids = _render(encoding, _without_old_thoughts(made.found))
        return pack_tokens(_with_old_headers(encoding, ids))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        decoded: str = _encoding().decode_utf8(list(ids))
        return decoded


class _Messages:
    """Harmony messages, made one chat message after the other."""

    def __init__(self, date: str) -> None:
        self.found: list[Any] = []
        self._date = date
        self._tools: dict[str, str] = {}

    def preamble(self, chat: ChatInput, effort: str | None, *, with_tools: bool) -> Sequence[Mapping[str, Any]]:
        """Add the system and developer messages; returns the chat messages that are left."""
        import openai_harmony as harmony  # noqa: PLC0415 - optional

        messages = chat.messages
        instructions = None
        if messages and messages[0].get("role") in ("system", "developer"):
            instructions, messages = _flat(messages[0].get("content")), messages[1:]
        content = harmony.SystemContent.new().with_conversation_start_date(self._date)
        if effort is not None:
            content = content.with_reasoning_effort(harmony.ReasoningEffort(effort.capitalize()))
        self.found.append(harmony.Message.from_role_and_content(harmony.Role.SYSTEM, content))
        tools = chat.tools if with_tools else None
        if instructions or tools:
            self.found.append(_developer(instructions, tools or ()))
        for message in messages:
            for call in message.get("tool_calls") or ():
                self._tools[str(call.get("id"))] = str(call.get("function", {}).get("name"))
        return messages

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a chat message."""
        role = message["role"]
        if role == "assistant" and message.get("tool_calls"):
            self._add_calls(message)
        elif role == "tool":
            self._add_result(message)
        elif role in ("system", "developer"):
            if (instructions := _flat(message.get("content"))) is not None:
                self.found.append(_developer(instructions, ()))
        elif role == "assistant":
            if thoughts := _thoughts(message):
                self._say(thoughts, "analysis")
            if (contents := _contents(message.get("content"))) and contents[0].text:
                self._say(contents, "final")
        elif role == "user":
            self.found.append(_of_role("user", _contents(message.get("content"))))
        else:
            raise TokenizeInputError(f"messages: Harmony has no role {role[:40]!r}")

    def _say(self, content: Any, channel: str) -> None:
        self.found.append(_of_role("assistant", content).with_channel(channel))

    def _add_calls(self, message: Mapping[str, Any]) -> None:
        if content := _flat(message.get("content")):
            self._say(content, "commentary")
        if thoughts := _thoughts(message):
            self._say(thoughts, "analysis")
        for call in message["tool_calls"]:
            function = call.get("function", {})
            arguments = function.get("arguments") or ""
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments)
            said = _of_role("assistant", arguments).with_channel("commentary")
            self.found.append(said.with_recipient(f"functions.{function.get('name', '')}").with_content_type("json"))

    def _add_result(self, message: Mapping[str, Any]) -> None:
        import openai_harmony as harmony  # noqa: PLC0415 - optional

        name = self._tools.get(str(message.get("tool_call_id", "")), "")
        author = harmony.Author.new(harmony.Role.TOOL, f"functions.{name}")
        said = harmony.Message.from_author_and_content(author, _flat(message.get("content")) or "")
        self.found.append(said.with_channel("commentary").with_recipient("assistant"))


def _thoughts(message: Mapping[str, Any]) -> str | None:
    found: str | None = message.get("reasoning")
    return message.get("reasoning_content") if found is None else found


def _of_role(role: str, content: Any) -> Any:
    import openai_harmony as harmony  # noqa: PLC0415 - optional

    if isinstance(content, str):
        return harmony.Message.from_role_and_content(harmony.Role(role), content)
    return harmony.Message.from_role_and_contents(harmony.Role(role), content)


def _developer(instructions: str | None, tools: Sequence[Mapping[str, Any]]) -> Any:
    import openai_harmony as harmony  # noqa: PLC0415 - optional

    content = harmony.DeveloperContent.new()
    if instructions is not None:
        content = content.with_instructions(instructions)
    if tools:
        functions = [tool["function"] for tool in tools]
        content = content.with_function_tools(
            [
                harmony.ToolDescription.new(
                    name=function["name"],
                    description=function.get("description") or "",
                    parameters=function.get("parameters"),
                )
                for function in functions
            ]
        )
    return harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)


def _flat(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    found = [text for text in texts if text is not None]
    return "".join(found) if found else None


def _contents(content: Any) -> list[Any]:
    import openai_harmony as harmony  # noqa: PLC0415 - optional

    if content is None or isinstance(content, str):
        return [harmony.TextContent(text=content or "")]
    found = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text", ""), str):
            raise TokenizeInputError("messages: Harmony takes text parts only")
        found.append(harmony.TextContent(text=part.get("text", "")))
    return found


def _without_old_thoughts(messages: list[Any]) -> list[Any]:
    """Drop the analysis that stands before the last final answer: models do not see it again."""
    finals = [
        number
        for number, message in enumerate(messages)
        if message.author.role == "assistant" and message.channel == "final"
    ]
    last = finals[-1] if finals else -1
    return [message for number, message in enumerate(messages) if number >= last or message.channel != "analysis"]


def _render(encoding: Any, messages: list[Any]) -> list[int]:
    import openai_harmony as harmony  # noqa: PLC0415 - optional

    try:
        ids: list[int] = encoding.render_conversation_for_completion(
            harmony.Conversation.from_messages(messages),
            harmony.Role.ASSISTANT,
            config=harmony.RenderConversationConfig(auto_drop_analysis=False),
        )
    except harmony.HarmonyError as error:
        raise TokenizeInputError(f"Harmony refuses the chat: {error}") from error
    return ids


def _with_old_headers(encoding: Any, ids: list[int]) -> list[int]:
    """Write headers of tool calls with the recipient in front of the channel, as the models know them and vLLM does.

    Newer versions of the library put the recipient behind the channel, and the format behind a token of its own::

        assistant<|channel|>commentary to=functions.f <|constrain|>json      becomes
        assistant to=functions.f<|channel|>commentary json
    """
    names = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")
    start, channel, constrain, message = (encoding.encode(name, allowed_special="all")[0] for name in names)
    found: list[int] = []
    at = 0
    for begin, end in _headers(ids, start, message):
        found += ids[at:begin]
        header = ids[begin:end]
        found += _old_header(encoding, header, channel, constrain)
        at = end
    return found + ids[at:]


def _headers(ids: list[int], start: int, message: int) -> Iterator[tuple[int, int]]:
    """Yield where headers begin, behind their start token, and where their message token stands."""
    at = 0
    while True:
        try:
            begin = ids.index(start, at) + 1
            at = ids.index(message, begin)
        except ValueError:
            return
        yield begin, at


def _old_header(encoding: Any, header: list[int], channel: int, constrain: int) -> list[int]:
    if channel not in header or constrain not in header[header.index(channel) :]:
        return header
    middle = header.index(channel)
    last = header.index(constrain, middle)
    author = encoding.decode(header[:middle])
    name, separator, recipient = encoding.decode(header[middle + 1 : last]).partition(" to=")
    if author != "assistant" or not separator:
        return header
    form = encoding.decode(header[last + 1 :])
    before = encoding.encode(f"{author} to={recipient.strip()}")
    return [*before, channel, *encoding.encode(f"{name} {form}")]


@cache
def _encoding() -> Any:
    try:
        import openai_harmony as harmony  # noqa: PLC0415 - optional

        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except ImportError as error:
        raise TokenizeInputError(
            "chats of type gpt_oss are rendered by Harmony, which needs kvatlas[harmony]; send token ids instead"
        ) from error
    except Exception as error:  # the library's own error, and whatever loading a vocabulary may meet
        raise TokenizeInputError(f"chats of type gpt_oss: Harmony's vocabulary cannot be loaded: {error}") from error
