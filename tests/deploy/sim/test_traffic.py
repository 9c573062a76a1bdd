"""Conversations and traces."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.errors import TraceError
from kvatlas.deploy.sim.options import SimPlan


def test_a_turn_extends_the_turn_before() -> None:
    """A conversation's prompt begins with its earlier prompt and the answer to it."""
    last: dict[int, list[int]] = {}
    extended = 0
    for request in islice(traffic.conversations(SimPlan(sessions=5, vocabulary=1000)), 200):
        before = last.get(request.session)
        if before is not None:
            assert request.tokens[: len(before)] == before
            extended += 1
        last[request.session] = request.tokens + request.output
    assert extended > 100


def test_conversations_share_system_prompts_and_come_at_the_rate() -> None:
    """There are as many first blocks as system prompts, and request n arrives after n / rate seconds."""
    settings = SimPlan(system_prompts=3, system_tokens=32, requests_per_second=4.0)
    served = list(islice(traffic.conversations(settings), 100))
    assert len({tuple(request.tokens[:32]) for request in served}) == 3
    assert served[10].at_seconds == pytest.approx(2.5)


def test_shares_of_salts_and_adapters_are_kept() -> None:
    """No conversation is salted at share 0 and every one at share 1."""
    plain = islice(traffic.conversations(SimPlan(salted_share=0, lora_share=0)), 50)
    assert all(request.cache_salt is None and request.lora is None for request in plain)
    salted = islice(traffic.conversations(SimPlan(salted_share=1, lora_share=1)), 50)
    assert all(request.cache_salt and request.lora for request in salted)


def write(path: Path, *lines: object) -> Path:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_shares_blocks_of_equal_ids(tmp_path: Path, name: str) -> None:
    """Equal hash ids become equal runs of 512 tokens; lengths and times are the trace's."""
    path = write(
        tmp_path / name,
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 3000, "input_length": 1024, "output_length": 900, "hash_ids": [7, 9]},
    )
    first, second = traffic.trace(SimPlan(trace=str(path), trace_speed=2.0, trace_output_tokens=64))
    assert (len(first.tokens), len(second.tokens)) == (1000, 1024)
    assert first.tokens[:512] == second.tokens[:512]
    assert first.tokens[512:600] != second.tokens[512:600]
    assert (len(first.output), len(second.output)) == (5, 64)
    assert second.at_seconds == pytest.approx(1.5)
    assert first.session == second.session == 7


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{not json\n", "trace.jsonl:2"),
        ({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}, "expected 2"),
        ({"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}, "input_length"),
    ],
)
def test_a_bad_trace_line_is_named(tmp_path: Path, line: object, text: str) -> None:
    """The error says file, line and what is wrong."""
    good = {"timestamp": 0, "input_length": 16, "output_length": 1, "hash_ids": [1]}
    path = write(tmp_path / "trace.jsonl", good, line)
    with pytest.raises(TraceError, match=text):
        list(traffic.requests(SimPlan(trace=str(path))))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    """The error says which file cannot be read."""
    with pytest.raises(TraceError, match=r"none\.jsonl"):
        list(traffic.requests(SimPlan(trace=str(tmp_path / "none.jsonl"))))
