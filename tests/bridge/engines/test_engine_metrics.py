"""Load out of engines' metrics pages."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.engines.engine_metrics import EngineLoad, read_load, read_stat

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "captures" / "golden_sglang.json").read_text())
VLLM = """# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
"""
SGLANG = """sglang:num_running_reqs{model_name="m",tp_rank="0",dp_rank="0"} 2
sglang:num_queue_reqs{model_name="m",tp_rank="0",dp_rank="0"} 5
sglang:token_usage{model_name="m",tp_rank="0",dp_rank="0"} 0.5
"""


def test_ranks_behind_one_port_are_summed_and_usage_averaged() -> None:
    assert read_load(VLLM) == EngineLoad(7.0, 1.0, 0.5)
    assert read_load(VLLM, rank=1) == EngineLoad(4.0, 0.0, 0.75)
    assert read_load(SGLANG) == EngineLoad(2.0, 5.0, 0.5)


def test_missing_family_keeps_the_others_and_nonsense_is_none() -> None:
    assert read_load("vllm:num_requests_running 2\nvllm:kv_cache_usage_perc NaN\n") == EngineLoad(2.0, None, None)
    assert not read_load("up 1\n").known


def test_asleep_is_not_awake_in_any_of_its_parts() -> None:
    name = "vllm:engine_sleep_state"
    page = "".join(
        f'{name}{{engine="{engine}",sleep_state="{state}"}} {value}\n'
        for engine, awake in (("0", 0), ("1", 1))
        for state, value in (("awake", awake), ("weights_offloaded", 1 - awake), ("discard_all", 0))
    )
    assert [read_load(page, rank).awake for rank in (0, 1, None)] == [0.0, 1.0, 1.0]
    assert read_load(VLLM).awake is None
    assert read_load(VLLM + page, 0).named() == read_load(VLLM, 0).named()


def test_prefix_hits_are_those_of_the_cache_and_of_the_connector() -> None:
    page = (
        'vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0\n'
        'vllm:prefix_cache_queries_total{engine="1",model_name="m"} 500.0\n'
        'vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09\n'
        'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 600.0\n'
        'vllm:prefix_cache_hits_total{engine="1",model_name="m"} 100.0\n'
        'vllm:external_prefix_cache_queries_total{engine="0",model_name="m"} 400.0\n'
        'vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 50.0\n'
    )
    assert read_load(page) == EngineLoad(asked=1500.0, found=750.0)
    assert not read_load(page).known
    assert read_load(VLLM + page, rank=1) == EngineLoad(4.0, 0.0, 0.75, 500.0, 100.0)
    assert read_load(VLLM + page).named() == {
        "running": 7.0, "waiting": 1.0, "cache_usage": 0.5, "prefix_asked_tokens": 1500.0, "prefix_found_tokens": 750.0,
    }  # fmt: skip
    sglang = 'sglang:cached_tokens_total{cache_source="device"} 3\nsglang:cached_tokens_total{cache_source="host"} 4\n'
    assert read_load(sglang + "sglang:prompt_tokens_total 9\n") == EngineLoad(asked=9.0, found=7.0)
    assert read_load("vllm:prefix_cache_queries_total inf\n") == EngineLoad()


def test_the_load_socket_tells_by_every_recorded_form() -> None:
    """Running, waiting, and usage where the capacity is told."""
    stats = {case: said for case, said in GOLDEN.items() if case.endswith("/load_stat")}
    assert len(stats) == 3
    for said in stats.values():
        _, running, waiting, used, capacity, *_ = said["json"]
        load = read_stat([b"load", b"\0" * 8, bytes.fromhex(said["hex"])])
        assert load == EngineLoad(running, waiting, used / capacity)
    unknown = read_stat([b"load", b"", msgspec.msgpack.encode(["LoadStat", 1, 2, 3, 0, 0])])
    assert unknown == EngineLoad(1.0, 2.0, None)
    assert unknown.named() == {"running": 1.0, "waiting": 2.0}


@pytest.mark.parametrize(
    "wrong", [["LoadStat", 1, 2, -3, 0], ["LoadStat", 1, "x", 3, 4], ["Other", 1, 2, 3, 4], ["LoadStat"], 7]
)
def test_what_is_no_load_is_none(wrong: object) -> None:
    assert read_stat([b"load", b"", msgspec.msgpack.encode(wrong)]) is None
    assert read_stat([b"load", msgspec.msgpack.encode(wrong)]) is None


@given(st.binary(max_size=60))
def test_any_bytes_on_the_load_socket_are_read(payload: bytes) -> None:
    read_stat([b"load", b"", payload])


@given(st.text(max_size=300))
def test_any_page_is_read(page: str) -> None:
    read_load("vllm:num_requests_running{" + page)
