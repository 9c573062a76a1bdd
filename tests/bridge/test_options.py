"""Endpoint specs: what they say and what is refused."""

from __future__ import annotations

import re

import pytest

from kvatlas.bridge.engines.discovery import static_specs
from kvatlas.bridge.engines.spec import EngineSpec, parse_engine
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings


def test_a_spec_says_everything_about_an_endpoint() -> None:
    """Addresses and every option of a spec are kept."""
    text = "tcp://a:1, tcp://a:2, pod=p, model=org/m, engine=sglang, store=s, announcements=presence"
    assert parse_engine(text) == [
        EngineSpec(
            live="tcp://a:1",
            replay="tcp://a:2",
            pod="p",
            model="org/m",
            engine="sglang",
            store="s",
            announcements="presence",
        )
    ]


def test_ranks_are_at_both_ports_plus_their_number() -> None:
    """`dp=3` gives three endpoints, each with both ports moved by its rank."""
    specs = parse_engine("tcp://a:5557,tcp://a:6557,dp=3")
    assert [(s.live, s.replay, s.rank, s.ranks) for s in specs] == [
        ("tcp://a:5557", "tcp://a:6557", 0, 3),
        ("tcp://a:5558", "tcp://a:6558", 1, 3),
        ("tcp://a:5559", "tcp://a:6559", 2, 3),
    ]
    assert [s.live for s in parse_engine("ipc:///tmp/kv,dp=2")] == ["ipc:///tmp/kv", "ipc:///tmp/kv_dp1"]


def test_an_ipv6_address_keeps_its_brackets() -> None:
    """The port is what follows the last colon."""
    assert parse_engine("tcp://[fd00::1]:5557,dp=2")[1].live == "tcp://[fd00::1]:5558"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pod=a",
        "tcp://a",
        "tcp://:1",
        "tcp://*:5557",
        "tcp://a:0",
        "tcp://a:65536",
        "tcp://a:x",
        "http://a:1",
        "tcp://a:1,tcp://b:2,tcp://c:3",
        "tcp://a:1,colour=red",
        "tcp://a:1,dp=0",
        "tcp://a:1,dp=-1",
        "tcp://a:1,dp=5000",
        "tcp://a:65535,dp=2",
        "tcp://a:5557,tcp://a:5558,dp=2",
        "tcp://a:1,engine=other",
        "tcp://a:1,announcements=never",
    ],
)
def test_a_bad_spec_is_refused_by_name(text: str) -> None:
    """What cannot be an endpoint is refused, and the text says which spec."""
    with pytest.raises(SettingsError, match="engine"):
        parse_engine(text)


def test_settings_read_their_engines() -> None:
    """The static list may hold several endpoints of several ranks."""
    settings = BridgeSettings(engines=["tcp://a:1", "tcp://b:1,dp=2"])
    assert [spec.live for spec in static_specs(settings)] == ["tcp://a:1", "tcp://b:1", "tcp://b:2"]


def test_bound_addresses_need_a_bridge_of_their_own() -> None:
    """Bind mode with several bridges is refused before anything starts, and both settings are named."""
    settings = BridgeSettings(bind=["tcp://*:5557"])
    with pytest.raises(SettingsError, match=r"bridge\.bind needs bridge\.ownership=all"):
        static_specs(settings)
    with pytest.raises(SettingsError, match=r"bridge\.ownership"):
        BridgeService(settings, KafkaSettings(brokers="127.0.0.1:1"))
    assert static_specs(BridgeSettings(bind=["tcp://*:5557"], ownership="all")) == []


def test_an_ipv6_address_without_brackets_is_refused_with_the_right_form() -> None:
    """The message has what to write instead."""
    with pytest.raises(SettingsError, match=re.escape("tcp://[fd00::1]:5557")):
        parse_engine("tcp://fd00::1:5557")


def test_options_of_an_endpoint_become_headers() -> None:
    """What only the endpoint's options say travels with the pod's messages."""
    [spec] = parse_engine("tcp://a:1,announcements=auto,blocks_per_chunk=4,store=s")
    assert dict(spec.headers()) == {"announcements": b"auto", "blocks_per_chunk": b"4", "store": b"s"}
    [spec] = parse_engine("tcp://a:1,speculation=qwen3_next_mtp")
    assert dict(spec.headers()) == {"computes_again": b"1"}
    for other in ("engine=sglang,speculation=EAGLE", "speculation=ngram", "speculation=draft_model", "speculation="):
        assert parse_engine(f"tcp://a:1,{other}")[0].headers() == []
    for bad in ("x", "-1", "70000"):
        with pytest.raises(SettingsError, match="blocks_per_chunk"):
            parse_engine(f"tcp://a:1,blocks_per_chunk={bad}")
