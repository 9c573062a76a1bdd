"""Bodies of requests are read as engines read them, and nothing else comes out than prompts or a named field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import Encoded, Place, Truncation

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions", "chat/completions"),
        ("v1/completions/render", "completions"),
        ("/v1/messages?beta=true", "messages"),
        ("responses", "responses"),
        ("/inference/v1/generate", "generate"),
        ("/v1/embeddings", None),
        ("", None),
    ],
)
def test_shape_of_a_path(path: str, shape: str | None) -> None:
    """The path that a client would use tells the shape."""
    assert requests.shape_of(path) == shape


def test_shape_of_a_body() -> None:
    """A body without a path is told by its fields."""
    for field, shape in (("prompt", "completions"), ("messages", "chat/completions"), ("input", "responses")):
        assert requests.shape_of_body({"model": "m", field: "x"}) == shape
    assert requests.shape_of_body({"token_ids": [1], "messages": None}) == "generate"
    with pytest.raises(TokenizeInputError, match="neither prompt nor"):
        requests.shape_of_body({"model": "m"})


def test_common_fields() -> None:
    """Model, salt, adapter, places and truncation come with every shape."""
    body = {
        "model": "m",
        "prompt": [1, 2**32 - 1],
        "cache_salt": "tenant",
        "lora": "a",
        "multimodal": [{"identifier": "x", "offset": 0, "length": 1}],
        "truncate_prompt_tokens": 1,
        "truncation_side": "right",
        "temperature": 0.5,
    }
    [request] = requests.read("completions", body)
    assert (request.model, request.cache_salt, request.lora) == ("m", "tenant", "a")
    assert Encoded(request.tokens or b"").list() == [1, 2**32 - 1]
    assert request.multimodal == (Place("x", 0, 1),)
    assert request.truncation == Truncation(1, "right")


@pytest.mark.parametrize(
    ("shape", "body", "field"),
    [
        ("completions", [], "body"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [1, True]}, "prompt"),
        ("completions", {"prompt": [1, -1]}, "prompt"),
        ("completions", {"prompt": [[1], "", [2]]}, r"prompt\[1\]"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("completions", {"prompt": "x", "model": 3}, "model"),
        ("completions", {"prompt": "x", "cache_salt": "a/b"}, "cache_salt"),
        ("completions", {"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("completions", {"prompt": "x", "truncation_side": "up"}, "truncation_side"),
        ("completions", {"prompt": "x", "multimodal": [{}]}, r"multimodal\[0\].identifier"),
        ("chat/completions", {"messages": [USER, {"content": "x"}]}, r"messages\[1\].role"),
        ("chat/completions", {"messages": [USER], "documents": ["x"]}, r"documents\[0\]"),
        ("chat/completions", {"messages": [USER], "tool_choice": "auto"}, "tool_choice"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role"),
        ("messages", {"messages": [USER], "system": 5}, "system"),
        ("messages", {"messages": [USER], "tools": [{"input_schema": {}}]}, r"tools\[0\].name"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ("responses", {"input": [{"type": "image_generation_call"}]}, r"input\[0\]"),
        ("generate", {"token_ids": []}, "token_ids"),
        ("generate", {"token_ids": [1], "features": {"mm_hashes": {"image": ["x"]}}}, "features"),
    ],
)
def test_refusals_name_the_field(shape: Any, body: Any, field: str) -> None:
    """What no engine takes is refused with the field that is wrong."""
    with pytest.raises(TokenizeInputError, match=f"^{field}"):
        requests.read(shape, body)


def test_anthropic_blocks_become_chat_messages() -> None:
    """Results of tools become messages in front of what the user says, thinking becomes reasoning."""
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: 1"},
            {"type": "text", "text": "Be "},
            {"type": "text", "text": "brief."},
        ],
        "messages": [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "4"}]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
    }
    [request] = requests.read("messages", body)
    assert request.chat is not None
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert list(request.chat.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t", "content": "4"},
        {"role": "user", "content": "and?"},
    ]


def test_response_items_of_one_turn_become_one_message() -> None:
    """Reasoning, text and calls of an assistant that follow each other are one message."""
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ]
    [request] = requests.read("responses", {"input": items, "instructions": "Be brief."})
    assert request.chat is not None
    assert [message["role"] for message in request.chat.messages] == ["system", "user", "assistant", "tool"]
    turn = request.chat.messages[2]
    assert (turn["reasoning"], turn["content"], len(turn["tool_calls"])) == ("hm", "Looking.", 1)
    assert request.chat.add_special_tokens


_FIELD_NAMES = """
model prompt messages input token_ids features system tools role content type text tool_calls function name
arguments id tool_choice cache_salt multimodal offset length identifier thinking reasoning
truncate_prompt_tokens chat_template_kwargs documents mm_hashes mm_placeholders image summary source
tool_use_id output call_id
"""
_FIELDS = st.sampled_from(_FIELD_NAMES.split())
_VALUES = """
user assistant system tool text image tool_use tool_result thinking function function_call reasoning message
namespace custom auto none left
"""
_WORDS = st.sampled_from(_VALUES.split())
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**33) | st.floats() | st.text(max_size=4) | _WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_FIELDS | st.text(max_size=3), inner, max_size=6),
    max_leaves=30,
)


@given(st.sampled_from(requests.SHAPES), st.dictionaries(_FIELDS, _JSON, max_size=8))
def test_any_body_is_read_or_refused(shape: requests.Shape, body: dict[str, Any]) -> None:
    """Whatever JSON comes, the answer is prompts with exactly one form each, or a refusal."""
    try:
        found = requests.read(shape, body)
    except TokenizeInputError:
        return
    assert found
    for one in found:
        assert sum(form is not None for form in (one.text, one.tokens, one.chat)) == 1
