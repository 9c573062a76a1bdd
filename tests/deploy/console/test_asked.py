"""A question of the page, read as far as the console needs it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvatlas.deploy.console.asked import read
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.tokenization.aside_jobs import read_json


def _read(body: Any) -> tuple[Any, Any]:
    return read(body if isinstance(body, bytes) else json.dumps(body).encode())


def test_token_ids_go_on_as_a_body_that_the_scorer_reads() -> None:
    """With what stands beside them, and nothing else."""
    asked, request = _read(
        {"model": "m", "tokens": [1, 2], "cache_salt": "s", "lora": None, "pods": ["a"], "at": "-1m"}
    )
    assert (asked.model, asked.at, asked.cache_salt) == ("m", "-1m", "s")
    (found,) = read_json("", request.request_json.encode())
    assert (found.model, found.cache_salt, found.lora, found.pods) == ("m", "s", "", ("a",))
    assert found.tokens == b"\1\0\0\0\2\0\0\0"


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "prompt": "x"},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 3},
        {"model": "m", "input": "x", "session_id": "s", "tokens": None},
    ],
)
def test_a_body_of_an_engine_goes_on_as_it_is(body: dict[str, Any]) -> None:
    assert json.loads(_read(body)[1].request_json) == body


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": ""},
        {"model": 3, "prompt": "x"},
        {"model": "m"},
        {"model": "m", "prompt": None},
        {"model": "m", "prompt": "x", "at": 3},
        {"model": "m", "prompt": "x", "pods": "a"},
        *(
            {name: "n" * 1_025, "prompt": "x", **({} if name == "model" else {"model": "m"})}
            for name in ("model", "at")
        ),
        *({name: "n" * 1_025, "prompt": "x", "model": "m"} for name in ("lora", "cache_salt", "session_id")),
        {"model": "m", "prompt": "x", "pods": ["n" * 1_025]},
        [],
        b"",
        b"[" * 8_000_000,
        b'{"model": "m", "prompt": ' + b"[" * 8_000_000,
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "\xed\xa0\x80", "prompt": "x"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "m", "prompt": NaN}',
    ],
    ids=lambda body: str(body)[:40],
)
def test_what_is_no_question_is_an_error_that_says_why(body: Any) -> None:
    with pytest.raises(InputError):
        _read(body)
