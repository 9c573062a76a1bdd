"""Chat to text, with the model's template or the request's, as transformers renders it for vLLM."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from jinja2 import Template
from jinja2.exceptions import TemplateError as JinjaTemplateError

from kvatlas.scorer.tokenization import content_format, messages
from kvatlas.scorer.tokenization.errors import (
    NoTemplateError,
    PromptLimitError,
    TemplateError,
    TemplateLimitError,
    TokenizeInputError,
)
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.records import ChatInput
from kvatlas.scorer.tokenization.sandbox import LimitReached, TemplateEnvironment, parse_plain

_COMPILED: Final = 128
#: Put at the end of the message to continue and looked for in the text; its blank shows whether templates trim.
_MARK: Final = "KVATLAS_CONTINUE_HERE "
_RESERVED: Final = frozenset({"messages", "chat_template", "tokenize"})


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: Template
    form: content_format.Format
    knows_developer: bool


class ChatRenderer:
    """Renders chats of all models; safe to use from many threads."""

    def __init__(self, settings: TokenizerSettings, now: Callable[[], datetime] = datetime.now) -> None:
        self._settings = settings
        self._environment = TemplateEnvironment(now)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def render(self, chat: ChatInput, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> str:
        """Render one chat.

        Args:
            chat: messages and how to render them.
            templates: the model's templates by name.
            special_tokens: template variable -> token text.

        Raises:
            NoTemplateError: there is no template to use.
            TemplateError: the template is broken or refuses the messages.
            TemplateLimitError: rendering took too long or too much.
            PromptLimitError: there are too many messages, or the request's template is too long.
            TokenizeInputError: the messages make no sense.
        """
        if len(chat.messages) > self._settings.max_messages:
            raise PromptLimitError(
                f"{len(chat.messages)} messages; the limit is {self._settings.max_messages} (setting max_messages)"
            )
        if reserved := _RESERVED & chat.kwargs.keys():
            raise TokenizeInputError(f"template arguments {sorted(reserved)} are not for requests to set")
        if chat.add_generation_prompt and chat.continue_final_message:
            raise TokenizeInputError("add_generation_prompt and continue_final_message exclude each other")
        source = self._choose(chat, templates)
        compiled = self._compile(source)
        given = self._settings.content_format
        conversation = messages.prepare(chat.messages, compiled.form if given == "auto" else given)
        if not compiled.knows_developer:
            conversation = messages.developer_as_system(conversation)
        final = _mark_final(conversation, source) if chat.continue_final_message else None
        variables: dict[str, Any] = {
            **special_tokens,
            "documents": None,
            "tools": None,
            **chat.kwargs,
            "messages": conversation,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        if chat.tools is not None:
            variables["tools"] = chat.tools
        if chat.documents is not None:
            variables["documents"] = chat.documents
        text = self._run(compiled.template, variables)
        return text if final is None else _cut_at_mark(text, final)

    def _choose(self, chat: ChatInput, templates: Mapping[str, str]) -> str:
        wanted = chat.chat_template
        if wanted is None:
            if chat.tools is not None and "tool_use" in templates:
                return templates["tool_use"]
            if "default" in templates:
                return templates["default"]
            names = f"only templates named {sorted(templates)}" if templates else "no chat template"
            raise NoTemplateError(f"the model has {names}: name one, or send a template with the request")
        if wanted in templates:
            return templates[wanted]
        if not self._settings.request_templates:
            raise TokenizeInputError("chat templates of requests are turned off (setting request_templates)")
        if len(wanted) > self._settings.max_template_bytes:
            raise PromptLimitError(
                f"chat template of {len(wanted)} characters; the limit is {self._settings.max_template_bytes} "
                f"(setting max_template_bytes)"
            )
        return wanted

    def _compile(self, source: str) -> _Compiled:
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source]
        try:
            template = self._environment.compile_template(source)
            form = content_format.detect(parse_plain(self._environment, source))
        except JinjaTemplateError as error:
            line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            raise TemplateError(f"the chat template does not compile: {error}{line}") from error
        except (RecursionError, OverflowError, MemoryError) as error:
            raise TemplateError(f"the chat template does not compile: {type(error).__name__}") from error
        developer = '"developer"' in source or "'developer'" in source
        compiled = _Compiled(template, form, developer)
        with self._lock:
            self._compiled[source] = compiled
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _run(self, template: Template, variables: Mapping[str, Any]) -> str:
        budget = self._environment.budget
        limit = self._settings.max_prompt_bytes
        budget.max_chars = limit
        budget.ends_at = budget.clock() + self._settings.template_seconds
        chunks, size = [], 0
        try:
            for chunk in template.generate(variables):
                size += len(chunk)
                budget.check()
                budget.check_size(size)
                chunks.append(chunk)
        except LimitReached as error:
            raise TemplateLimitError(
                f"rendering the chat template {error} (settings template_seconds = {self._settings.template_seconds}, "
                f"max_prompt_bytes = {limit})"
            ) from error
        except JinjaTemplateError as error:
            raise TemplateError(f"the chat template refuses the request: {error}") from error
        except Exception as error:
            # Anything can come out of a template: a missing field, a type that does not fit, too deep a recursion.
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
        finally:
            budget.ends_at = float("inf")
        return "".join(chunks)


def _mark_final(conversation: list[dict[str, Any]], source: str) -> str:
    """Put the mark at the end of the last message's text, and return that text."""
    if not conversation or "content" not in source:
        raise TokenizeInputError("continue_final_message: there is no message, or the template uses no content")
    message = conversation[-1] = copy.deepcopy(conversation[-1])
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    for part in reversed(content):
        if "text" in part:
            text = str(part["text"])
            part["text"] = text + _MARK
            return text
    raise TokenizeInputError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    bare = _MARK.strip()
    place = text.rfind(bare)
    if place < 0 or final.strip() not in text:
        raise TemplateError("continue_final_message: the template does not show the last message as it is")
    before = text[:place]
    # A template that trims messages took the mark's blank; then blanks before it would have gone too.
    return before if text.startswith(_MARK, place) else before.rstrip()
