"""Engines that tell over HTTP where they publish."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvatlas.bridge.engines.discovery import discover
from kvatlas.bridge.engines.facts import EventSource, reachable, sglang_facts
from kvatlas.bridge.engines.http import ask_engine, parse_http, specs_of, specs_over_http
from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.options import BridgeSettings
from tests.bridge.engines.fake_engine import fake_engine, vllm

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "captures" / "golden_server_info.json").read_text())


async def test_vllm_tells_sockets_models_and_block_size() -> None:
    """Wildcards are the engine's own host; the first served name is the model."""
    with fake_engine(vllm()) as url:
        facts = await ask_engine(url)
        (spec,) = await specs_over_http(url)
    assert facts.version == "0.33.0"
    assert facts.models == ("m", "alias")
    assert (facts.block_size_tokens, facts.prefix_caching) == (16, True)
    assert (spec.live, spec.replay, spec.model) == ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", "m")
    assert spec.pod == url.partition("://")[2]
    assert (spec.metrics, spec.load) == (f"{url}/metrics", "")


@pytest.mark.parametrize(
    ("speculative", "method", "headers"),
    [
        (None, "", []),
        ({"method": "eagle3"}, "eagle3", [("computes_again", b"1")]),
        ({"method": "ngram"}, "ngram", []),
        ({"method": "mtp", "disable_eagle_block_drop": True}, "on", []),
        ({"method": None}, "on", []),
    ],
)
async def test_vllm_in_development_mode_tells_how_it_speculates(
    speculative: dict[str, Any] | None, method: str, headers: list[tuple[str, bytes]]
) -> None:
    """What it computes again travels with its messages; the endpoint's own option goes before."""
    info = {"vllm_config": {"speculative_config": speculative}, "vllm_env": {}, "system_env": {}}
    with fake_engine(vllm(**{"/server_info": info})) as url:
        assert (await ask_engine(url)).speculation == method
        assert (await specs_over_http(url))[0].headers() == headers
        assert (await specs_over_http(f"{url},speculation=none"))[0].headers() == []


async def test_what_an_engine_said_of_its_speculation_does_not_come_and_go(tmp_path: Path) -> None:
    """Once it does not get to answering, its endpoints stay as they were."""
    answers = vllm(**{"/server_info": {"vllm_config": {"speculative_config": {"method": "mtp"}}}})
    known: dict[str, Any] = {}
    with fake_engine(answers) as url:
        settings = BridgeSettings(engines=[url])
        (spec,) = await discover(settings, known)
        answers["/server_info"] = object()  # no JSON: the connection is closed without an answer
        assert await discover(settings, known) == [spec]
        assert (await ask_engine(url)).speculation == ""
        del answers["/server_info"]
        assert [one.speculation for one in await discover(settings, known)] == [""]


@pytest.mark.parametrize("case", sorted(GOLDEN))
async def test_sglang_tells_its_ranks(case: str) -> None:
    """Every recorded form of `kv_events` gives one endpoint per rank, both ports plus the rank."""
    told = GOLDEN[case]
    info = {"kv_events": told, "page_size": 1, "version": case.partition("/")[0], "disable_radix_cache": False}
    with fake_engine({"/server_info": info, "/v1/models": {"data": [{"id": "q"}]}}) as url:
        facts = await ask_engine(url)
        specs = await specs_over_http(f"{url},pod=p,store=s")
    base, replay = told["endpoint_port_base"], told.get("replay_endpoint_port_base")
    assert [spec.live for spec in specs] == [f"tcp://127.0.0.1:{base + rank}" for rank in range(told["dp_size"])]
    assert [spec.replay for spec in specs] == [
        f"tcp://127.0.0.1:{replay + rank}" if replay else "" for rank in range(told["dp_size"])
    ]
    assert {(spec.engine, spec.pod, spec.model, spec.store, spec.ranks) for spec in specs} == {
        ("sglang", "p", "q", "s", told["dp_size"])
    }
    assert (facts.block_size_tokens, facts.prefix_caching) == (64, True)
    told_load = "load_topic" in told
    assert [(spec.metrics, spec.load) for spec in specs] == [
        ("", f"tcp://127.0.0.1:{told['load_endpoint_port_base'] + rank}") if told_load else (f"{url}/metrics", "")
        for rank in range(told["dp_size"])
    ]
    assert facts.load == (f"tcp://127.0.0.1:{told['load_endpoint_port_base']}" if "load_topic" in told else "")


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({}, "give the address of its OpenAI API"),
        ({"/v1/models": "<html>"}, "is no model list"),
        (vllm(**{"/kv_event_sources": {}}), "publishes no events: start it with --kv-events-config"),
        (vllm(**{"/kv_event_sources": None}), "does not say where it publishes"),
        ({"/server_info": {"kv_events": None, "page_size": 1}, "/v1/models": {"data": []}}, "publishes no events"),
    ],
)
async def test_an_engine_that_tells_no_sockets_is_an_error_with_the_fix(answers: dict[str, Any], text: str) -> None:
    """Each way of saying nothing has its own sentence."""
    with fake_engine(answers) as url, pytest.raises(UnresolvedError, match=text):
        await specs_over_http(url)


async def test_nobody_there_is_an_error() -> None:
    """A refused connection names the address."""
    with pytest.raises(UnresolvedError, match=r"engine http://127\.0\.0\.1:1:"):
        await ask_engine("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "text", ["http://", "http://h:x", "http://u:p@h:1", "http://h:1,http://i:1", "http://h:1,dp=2"]
)
def test_a_bad_http_spec_is_refused(text: str) -> None:
    """What is no address or no option of an HTTP spec is an error that shows it."""
    with pytest.raises(SettingsError, match="engine "):
        parse_http(text)


async def test_discovery_notices_changes_and_keeps_what_does_not_answer(tmp_path: Path) -> None:
    """New sockets are taken over; an engine that is away keeps its endpoints, and hides nobody else's."""
    file = tmp_path / "engines.json"
    known: dict[str, Any] = {}
    answers = vllm()
    with fake_engine(answers) as url:
        file.write_text(json.dumps([f"{url},pod=a"]))
        settings = BridgeSettings(engines=["tcp://b:1"], engines_file=str(file))
        assert [spec.live for spec in await discover(settings, known)] == ["tcp://b:1", "tcp://127.0.0.1:5557"]
        answers.update(vllm(live="tcp://10.0.0.7:6000"))
        assert [spec.live for spec in await discover(settings, known)] == ["tcp://b:1", "tcp://10.0.0.7:6000"]
    assert [spec.live for spec in await discover(settings, known)] == ["tcp://b:1", "tcp://10.0.0.7:6000"]


async def test_an_engine_that_tells_nonsense_hides_nobody() -> None:
    """Its endpoints are left out with a warning; who is no longer asked is forgotten."""
    known: dict[str, Any] = {}
    settings = BridgeSettings(engines=["tcp://b:1"])
    with fake_engine(vllm(live="tcp://*:99999")) as odd, fake_engine(vllm()) as good:
        found = await discover(settings, known, [odd, good])
        assert [spec.live for spec in found] == ["tcp://b:1", "tcp://127.0.0.1:5557"]
        assert list(known) == [good]
        assert [spec.live for spec in await discover(settings, known)] == ["tcp://b:1"]
        assert known == {}


@pytest.mark.parametrize(
    ("address", "url", "reached"),
    [
        ("tcp://*:1", "http://h:8000", "tcp://h:1"),
        ("tcp://0.0.0.0:1", "http://[fd00::1]:8000", "tcp://[fd00::1]:1"),
        ("tcp://127.0.0.1:1", "http://h:8000", "tcp://h:1"),
        ("tcp://127.0.0.1:1", "http://localhost:8000", "tcp://127.0.0.1:1"),
        ("tcp://10.0.0.7:1", "http://h:8000", "tcp://10.0.0.7:1"),
        ("tcp://h:0", "http://h:8000", ""),
        ("inproc://x", "http://h:8000", ""),
    ],
)
def test_addresses_as_they_are_reached(address: str, url: str, reached: str) -> None:
    """A wildcard or a loopback address of another machine is the engine's own host."""
    assert reachable(address, url) == reached


def test_odd_answers_are_facts_that_are_not_known() -> None:
    """Values of the wrong kind are left out, never guessed."""
    facts = sglang_facts("http://h:1", info={"kv_events": {"publisher": "zmq", "endpoint_port_base": "x"}}, models=3)
    assert facts.sources == ()
    assert facts.models == ()
    info = {"kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 7, "dp_size": 10**9}}
    assert sglang_facts("http://h:1", info=info, models=None).sources == (EventSource(rank=0, live="tcp://h:7"),)


_TOLD = st.none() | st.booleans() | st.integers(-2, 70_000) | st.just(2**70) | st.text(max_size=3) | st.just([1])
_PORTS = (
    "endpoint_port_base",
    "replay_endpoint_port_base",
    "load_endpoint_port_base",
    "dp_size",
    "block_size",
    "topic",
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*_PORTS, "endpoint_host"), _TOLD)))
@example({"endpoint_port_base": 7, "load_endpoint_port_base": True, "dp_size": 2})
def test_whatever_an_engine_tells_is_taken_or_said_to_be_wrong(told: dict[str, Any]) -> None:
    """No other error comes out: it would end the search for all engines."""
    facts = sglang_facts("http://h:1", info={"kv_events": {"publisher": "zmq", **told}}, models=None)
    with contextlib.suppress(SettingsError):
        specs_of(facts, {})
