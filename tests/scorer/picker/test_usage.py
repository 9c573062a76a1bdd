"""An engine's usage out of JSON and event streams, however they are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.picker.usage import Usage, UsageReader
from kvatlas.scorer.picker.verdict import CAUSES, Prediction, judge

USAGE = {"prompt_tokens": 40, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 32}}
CHAT = {"choices": [{"message": {"content": 'say "usage"'}}], "usage": USAGE}
RESPONSES = {"usage": {"input_tokens": 40, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 32}}}
MESSAGES = {"usage": {"input_tokens": 8, "cache_read_input_tokens": 32, "output_tokens": 5}}
#: Anthropic's three kinds of input tokens are apart: read, written, and neither.
WRITTEN = {"input_tokens": 3, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 32, "output_tokens": 5}
#: With tools of its own the engine prompts itself again: the sums are over all turns, the decision was about the first.
TURNS = {"cached_tokens": 100, "cached_tokens_per_turn": [32, 68], "input_tokens_per_turn": [40, 70]}


def events(*documents: object) -> bytes:
    return (
        b": keep-alive\n\n"
        + b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in documents)
        + b"data: [DONE]\n\n"
    )


STREAM = events({"choices": [{"delta": {"content": "a"}}], "usage": None}, {"choices": [], "usage": USAGE})
RESPONSES_STREAM = events({"type": "response.completed", "response": RESPONSES})
MESSAGES_STREAM = events(
    {"type": "message_start", "message": {"usage": {"input_tokens": 8, "cache_read_input_tokens": 32}}},
    {"type": "message_delta", "usage": {"output_tokens": 5}},
)
#: vLLM's: the first event may come before the cache is known, and has all input tokens then.
VLLM_MESSAGES_STREAM = events(
    {"type": "message_start", "message": {"usage": {"input_tokens": 40, "output_tokens": 0}}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": '"usage"'}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": WRITTEN},
    {"type": "message_stop"},
)


def read(kind: str, pieces: list[bytes]) -> Usage:
    reader = UsageReader(kind)
    for piece in pieces:
        reader.feed(piece)
    return reader.close()


@pytest.mark.parametrize(
    "document",
    [
        CHAT,
        RESPONSES,
        MESSAGES,
        {"usage": WRITTEN},
        {"usage": {"input_tokens": 110, "output_tokens": 5, "input_tokens_details": TURNS}},
        {"usage": {**RESPONSES["usage"], "input_tokens_details": {"cached_tokens": 32, "cached_tokens_per_turn": []}}},
    ],
)
def test_json_answers_of_every_api(document: object) -> None:
    assert read("application/json; charset=utf-8", [json.dumps(document).encode()]) == Usage(40, 32, 5)


@pytest.mark.parametrize("stream", [STREAM, RESPONSES_STREAM, MESSAGES_STREAM, VLLM_MESSAGES_STREAM])
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_streams_cut_anywhere(stream: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    pieces = [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert read("text/event-stream", pieces) == Usage(40, 32, 5)


def test_absent_is_not_zero() -> None:
    assert read("application/json", [b'{"usage": {"prompt_tokens": 4}}']) == Usage(4, -1, -1)
    assert read("application/json", [b"{}"]) == Usage()
    assert read("application/json", [b'{"usage": {"input_tokens": 4, "output_tokens": 1}}']) == Usage(4, -1, 1)
    assert read("text/html", [b'{"usage": {"prompt_tokens": 4}}']) == Usage()


@given(st.lists(st.binary(max_size=200), max_size=10), st.sampled_from(["text/event-stream", "application/json"]))
def test_anything_else_is_no_usage_and_no_error(pieces: list[bytes], kind: str) -> None:
    assert read(kind, [b'data: {"usage": ', *pieces]).prompt_tokens <= 10**400


def test_long_answers_are_not_gathered() -> None:
    reader = UsageReader("application/json", most_bytes=100)
    for _ in range(10):
        reader.feed(b"x" * 50)
    assert reader.close() == Usage()


P = Prediction("a:1", "pod-a", 100, 64)


@pytest.mark.parametrize(
    ("prediction", "cached", "prompt", "served", "kind", "cause"),
    [
        (P, 64, 100, "a:1", "exact", ""),
        (P, -1, 100, "a:1", "unknown", ""),
        (P, 32, 100, "b:1", "over", "elsewhere"),
        (P, 32, 101, "a:1", "over", "tokenizer"),
        (P, 32, 100, "", "over", "evicted"),
        (P, 80, 100, "a:1", "under", "stored"),
        (P._replace(partial=True), 80, 100, "a:1", "under", "partial"),
        (P._replace(degraded="deadline"), 80, 100, "a:1", "under", "degraded"),
        (P._replace(speculative_tokens=32), 32, 100, "a:1", "over", "speculative"),
        (P._replace(speculative_tokens=16), 32, 100, "a:1", "over", "evicted"),
        (P._replace(suspect_tokens=16), 32, 100, "a:1", "over", "suspect"),
    ],
)
def test_every_difference_has_a_cause(
    prediction: Prediction, cached: int, prompt: int, served: str, kind: str, cause: str
) -> None:
    verdict = judge(prediction, cached_tokens=cached, prompt_tokens=prompt, served=served)
    assert (verdict.kind, verdict.cause) == (kind, cause)
    assert cause in ("", *CAUSES)


def test_regret_is_what_the_best_other_pod_would_have_saved() -> None:
    prediction = P._replace(best_other_tokens=50.0, waiting_tokens=10.0)
    assert judge(prediction, cached_tokens=64, prompt_tokens=100, served="").regret_tokens == 0.0
    assert judge(prediction, cached_tokens=0, prompt_tokens=100, served="").regret_tokens == 60.0
