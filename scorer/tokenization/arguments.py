"""Command-line arguments of an engine that change how it renders prompts, read from its own command line.

An operator gives the very arguments that a model's engine was started with; those that matter here are taken, all
others are left alone::

    tiny=--enable-auto-tool-choice --tool-call-parser hermes --default-chat-template-kwargs '{"enable_thinking": false}'
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput

Format = Literal["auto", "string", "openai"]


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """What of an engine's command line changes its prompts.

    Attributes:
        known: the command line was given; without it, requests are not refused for what it may lack.
        chat_template: text of the template that replaces the model's own, None for none.
        template_kwargs: defaults of template variables.
        content_format: how templates get content; empty takes the setting.
        effort_map: requested reasoning effort -> the one the model gets.
        auto_tool_choice: requests may leave the choice of a tool to the model.
        tool_parser: there is a parser of tool calls, which required and named tools need.
        exclude_tools_when_none: tools that may not be called are not shown.
        tokenizer_mode: empty or ``auto`` for the usual one.
    """

    known: bool = False
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    content_format: Format | Literal[""] = ""
    effort_map: Mapping[str, str] = field(default_factory=dict)
    auto_tool_choice: bool = False
    tool_parser: bool = False
    exclude_tools_when_none: bool = False
    tokenizer_mode: str = ""

    def check_tools(self, chat: ChatInput) -> None:
        """Refuse a choice of tools that the engine refuses.

        Raises:
            TokenizeInputError: it does.
        """
        if not self.known or not chat.tools:
            return
        if chat.tool_choice == "auto" and not (self.auto_tool_choice and self.tool_parser):
            raise TokenizeInputError(
                "tool_choice: the model's engine runs without --enable-auto-tool-choice and --tool-call-parser and "
                "refuses tools without a choice"
            )
        if chat.tool_choice in ("required", "named") and not self.tool_parser:
            raise TokenizeInputError("tool_choice: the model's engine runs without --tool-call-parser")

    def hides_tools(self, chat: ChatInput) -> bool:
        """Whether the template sees no tools though the request has some."""
        return self.exclude_tools_when_none and chat.tool_choice == "none"

    def effort_of(self, effort: str | None) -> str | None:
        """Return the reasoning effort that the model gets."""
        return None if effort is None else self.effort_map.get(effort, effort)


UNKNOWN: Final = EngineArguments()


def engine_arguments(entries: Sequence[str]) -> dict[str, EngineArguments]:
    """Read the setting: one ``MODEL=ARGUMENTS`` a model.

    Raises:
        SettingsError: an entry cannot be read; names the model and the argument.
    """
    found = {}
    for entry in entries:
        model, equals, line = entry.partition("=")
        if not (model and equals):
            raise SettingsError(f"[tokenizer] engine_args: {entry[:80]!r} is not MODEL=ARGUMENTS")
        found[model] = _parsed(line, f"[tokenizer] engine_args of {model}")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in ("chat-template", "default-chat-template-kwargs", "reasoning-effort-map", "tool-call-parser"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--tokenizer-mode", default="")
    parser.add_argument("--chat-template-content-format", choices=("auto", "string", "openai"), default="")
    for flag in ("enable-auto-tool-choice", "exclude-tools-when-tool-choice-none"):
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=False)
    return parser


def _parsed(line: str, where: str) -> EngineArguments:
    try:
        # vLLM takes its flags with underscores too.
        words = [_dashed(word) for word in shlex.split(line)]
        args, _ = _parser().parse_known_args(words)
        return EngineArguments(
            known=True,
            chat_template=_template(args.chat_template),
            template_kwargs=_object(args.default_chat_template_kwargs, "--default-chat-template-kwargs"),
            content_format=args.chat_template_content_format,
            effort_map=_object(args.reasoning_effort_map, "--reasoning-effort-map"),
            auto_tool_choice=args.enable_auto_tool_choice,
            tool_parser=args.tool_call_parser is not None,
            exclude_tools_when_none=args.exclude_tools_when_tool_choice_none,
            tokenizer_mode=args.tokenizer_mode,
        )
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from error
    except OSError as error:
        raise SettingsError(f"{where}: --chat-template {error.filename}: {error.strerror}") from error


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _template(given: str | None) -> str | None:
    """Return a template's text: what is given is a file, or the template itself on one line."""
    if given is None:
        return None
    if "{" in given or "\n" in given:
        return given
    return Path(given).read_text(encoding="utf-8")


def _object(text: str | None, flag: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag}: a JSON object is wanted")
    return value
