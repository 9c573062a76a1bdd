"""Chat templates render to what transformers renders, and may cost no more than the settings allow."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kvatlas.scorer.tokenization import messages
from kvatlas.scorer.tokenization.backend import FolderEngine, Making
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.errors import (
    NoTemplateError,
    PromptLimitError,
    TemplateError,
    TemplateLimitError,
    TokenizeInputError,
)
from kvatlas.scorer.tokenization.harmony import HarmonyRenderer
from kvatlas.scorer.tokenization.limits import TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.records import ChatInput
from kvatlas.scorer.tokenization.text_cache import TextCache

DATA = Path(__file__).parents[2] / "data"
TEMPLATES = {path.stem: path.read_text() for path in sorted((DATA / "chat_templates").glob("*.jinja"))}
TEMPLATES["own"] = (DATA / "tokenizer" / "chat_template.jinja").read_text()
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What's the <weather> & «Wetter»?",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}, "at": {"type": "number"}}},
    },
}
DOCUMENTS = [{"title": "Tides", "text": "High at <noon>."}, {"title": "Ö", "text": "x & y"}]
SYSTEM = {"role": "system", "content": "Be brief.  "}
USER = {"role": "user", "content": "  How is <b>the</b> weather in Köln?\n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>Fine, I'd say. "}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"zone": "Köln", "at": 1.5}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"t": 3}'}
CHATS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "no prompt": {"messages": [USER, ANSWER], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, USER, ANSWER, USER]},
    "turns": {"messages": [USER, ANSWER] * 4 + [USER]},
    "tools": {"messages": [SYSTEM, USER, CALL, RESULT, ANSWER, USER], "tools": [WEATHER, WEATHER]},
    "calls": {"messages": [USER, CALL, RESULT, RESULT], "tools": [WEATHER]},
    "documents": {"messages": [USER], "documents": DOCUMENTS},
    "kwargs": {
        "messages": [USER],
        "kwargs": {"enable_thinking": False, "date_string": "1 May", "controls": {"length": "long"}},
    },
    "reasoning": {"messages": [USER, {"role": "assistant", "content": "ok", "reasoning": "\nso\n"}]},
    "continue": {"messages": [USER, ANSWER], "add_generation_prompt": False, "continue_final_message": True},
    "continue bare": {
        "messages": [USER, {"role": "assistant", "content": "The sky is"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "odd role": {"messages": [{"role": "critic", "content": "no"}]},
}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_file(str(DATA / "tokenizer" / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _renderer(**limits: Any) -> ChatRenderer:
    return ChatRenderer(TokenizerSettings(request_templates=True), datetime.now, limits=TokenizerLimits(**limits))


def _reference(tokenizer: PreTrainedTokenizerFast, template: str, chat: Mapping[str, Any], form: Any) -> str:
    """Render with transformers, from messages in the form vLLM hands to it; an error is told by its class alone."""
    prepared = messages.prepare(chat["messages"], form)
    try:
        text = tokenizer.apply_chat_template(
            prepared,
            chat_template=template,
            tools=chat.get("tools"),
            documents=chat.get("documents"),
            add_generation_prompt=chat.get("add_generation_prompt", True),
            continue_final_message=chat.get("continue_final_message", False),
            tokenize=False,
            **chat.get("kwargs", {}),
        )
    except Exception:
        return "refused"
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, case: str, reference: PreTrainedTokenizerFast) -> None:
    """Every template shape renders every chat to the text that transformers gives, or both refuse it."""
    chat = ChatInput(**CHATS[case])
    form = "openai" if name == "turns" else "string"
    wanted = _reference(reference, TEMPLATES[name], CHATS[case], form)
    try:
        got = _renderer().render(chat, {"default": TEMPLATES[name]}, SPECIAL)
    except TemplateError:
        got = "refused"
    assert got == wanted


def test_most_cases_are_rendered(reference: PreTrainedTokenizerFast) -> None:
    """The comparison is of texts, not of refusals: each template takes most chats."""
    for name, template in TEMPLATES.items():
        form = "openai" if name == "turns" else "string"
        texts = [_reference(reference, template, chat, form) for chat in CHATS.values()]
        assert sum(text != "refused" for text in texts) >= 6, name


def test_tokens_equal_transformers(reference: PreTrainedTokenizerFast) -> None:
    """Chat token ids are those of transformers: the template's special tokens and no second beginning token."""
    engine = FolderEngine(DATA / "tokenizer", Making(TextCache(2**20), _renderer(), HarmonyRenderer("", datetime.now)))
    chat = ChatInput([SYSTEM, USER, CALL, RESULT], tools=[WEATHER])
    encoded = engine.encode_chat(chat, None)
    wanted = reference.apply_chat_template(
        messages.prepare(chat.messages, "string"),
        chat_template=TEMPLATES["own"],
        tools=[WEATHER],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert encoded.list() == wanted


FORMATS = {
    "{% for m in messages %}{{ m.content }}{% endfor %}": "string",
    "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}": "openai",
    "{% for m in messages %}{% for c in m.content | list %}{{ c }}{% endfor %}{% endfor %}": "openai",
    "{% set rest = messages[1:] %}{% for m in rest %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}": "openai",
    "{% set n = namespace(r=messages) %}{% for m in n.r %}{% for c in m.content %}.{% endfor %}{% endfor %}": "openai",
    "{% macro show(x) %}{% for i in x %}{{ i }}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}"
    "{% endfor %}": "openai",
    "{% macro show(x) %}{% for i in x %}{{ i }}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.tools) }}"
    "{% endfor %}": "string",
    "{% for m in messages %}{% set content = m.content %}{% for c in content %}.{% endfor %}{% endfor %}": "openai",
    "{% macro f(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}{{ messages }}": "string",
}


@pytest.mark.parametrize(("template", "form"), FORMATS.items())
def test_content_format(template: str, form: str) -> None:
    """A template gets parts when it walks over a message's content, under whatever name, and text otherwise."""
    assert _renderer()._compile(template).form == form


def test_parts_become_what_the_template_takes() -> None:
    """Lists of parts are joined for templates that take text and kept, images included, for those that take parts."""
    parts = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": None}]
    image = {"type": "image_url", "image_url": {"url": "http://x"}, "mark": 1}
    assert messages.prepare([{"role": "user", "content": parts}], "string")[0]["content"] == "a\nb"
    ready = messages.prepare([{"role": "user", "content": [*parts, image]}], "openai")[0]["content"]
    assert ready == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image", "mark": 1}]
    with pytest.raises(TokenizeInputError, match="takes text only"):
        messages.prepare([{"role": "user", "content": [image]}], "string")


@pytest.mark.parametrize("arguments", ["", "not json", "[1]", None, 3])
def test_bad_arguments_become_an_empty_object(arguments: object) -> None:
    """Arguments of an earlier tool call that are not a JSON object do not spoil the conversation."""
    call = {"function": {"name": "f", "arguments": arguments}}
    ready = messages.prepare([{"role": "assistant", "content": None, "tool_calls": [call]}], "string")
    assert ready[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_arguments_are_parsed_and_the_request_left_alone() -> None:
    """Arguments come as JSON text and reach the template as an object; the caller's messages stay as they are."""
    call = {"function": {"name": "f", "arguments": '{"z": 1, "a": 2}'}}
    given = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    before = msgspec.json.encode(given)
    ready = messages.prepare(given, "string")
    assert list(ready[0]["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]
    assert msgspec.json.encode(given) == before


def test_developer_becomes_system() -> None:
    """A template that does not know developers gets one system message in front."""
    chat = ChatInput([USER, {"role": "developer", "content": "d"}, SYSTEM], add_generation_prompt=False)
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    text = _renderer().render(chat, {"default": template}, {})
    assert text == f"[system:d\n\nBe brief.  ][user:{USER['content']}]"
    known = _renderer().render(chat, {"default": template + "{# 'developer' #}"}, {})
    assert known.endswith("[developer:d][system:Be brief.  ]")


def test_template_choice() -> None:
    """The request's template wins, then the one for tools, then the default; a name picks one of the model's."""
    templates = {"default": "d", "tool_use": "t", "rag": "r"}
    renderer = _renderer()
    assert renderer.render(ChatInput([USER]), templates, {}) == "d"
    assert renderer.render(ChatInput([USER], tools=[]), templates, {}) == "t"
    assert renderer.render(ChatInput([USER], chat_template="rag"), templates, {}) == "r"
    assert renderer.render(ChatInput([USER], chat_template="{{ 1 + 1 }}"), templates, {}) == "2"
    with pytest.raises(NoTemplateError, match="rag"):
        renderer.render(ChatInput([USER]), {"rag": "r"}, {})
    with pytest.raises(NoTemplateError, match="no chat template"):
        renderer.render(ChatInput([USER]), {}, {})
    with pytest.raises(TokenizeInputError, match="request_templates"):
        ChatRenderer(TokenizerSettings(), datetime.now).render(
            ChatInput([USER], chat_template="x{{ 1 }}"), templates, {}
        )


HOSTILE = [
    "{% set r=range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10 ** 9999 ** 9999 }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{% for a in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' * 99 }}{% endfor %}",
    "{{ [1] | tojson(indent=10**9) }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_cost_is_bounded(template: str) -> None:
    """A template that would run for ever or fill the memory ends with an error that names the limits."""
    renderer = _renderer(template_seconds=0.2, prompt_bytes=2**20)
    with pytest.raises(TemplateLimitError, match=r"at most 0\.2 s"):
        renderer.render(ChatInput([USER], chat_template=template), {}, {})


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ x",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ a.b.c }}",
    ],
)
def test_bad_templates_are_told(template: str) -> None:
    """Broken templates, refusals and attempts to leave the sandbox are errors of the request."""
    with pytest.raises(TemplateError):
        _renderer().render(ChatInput([USER], chat_template=template), {}, {})


def test_limits_and_senseless_input() -> None:
    """Too many messages, too long a template, reserved arguments and contradictions are refused by name."""
    with pytest.raises(PromptLimitError, match="2 messages; the limit is 1"):
        _renderer(messages=1).render(ChatInput([USER, USER]), {"default": "d"}, {})
    with pytest.raises(PromptLimitError, match="chat template of 7 characters; the limit is 3"):
        _renderer(template_bytes=3).render(ChatInput([USER], chat_template="{{ 1 }}"), {}, {})
    with pytest.raises(TokenizeInputError, match="chat_template"):
        _renderer().render(ChatInput([USER], kwargs={"chat_template": "x"}), {"default": "d"}, {})
    with pytest.raises(TokenizeInputError, match="exclude"):
        _renderer().render(ChatInput([USER], continue_final_message=True), {"default": "d"}, {})
    with pytest.raises(TokenizeInputError, match="role"):
        _renderer().render(ChatInput([{"content": "x"}]), {"default": "d"}, {})
