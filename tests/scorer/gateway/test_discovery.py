"""Serving addresses from specs, files, events' pods and InferencePools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.gateway.discovery import from_pods, merged, parse_endpoint, read_endpoints, resolve
from kvatlas.scorer.gateway.kubernetes_pool import PoolState, endpoints_of, selector_of
from kvatlas.scorer.picker.endpoints import Endpoint


def test_ranks_listen_on_the_ports_that_follow() -> None:
    found = parse_endpoint("10.0.0.5:8000,pod=vllm-0,model=m,ranks=2,role=prefill-decode,engine=sglang")
    assert [(one.address, one.pod, one.role, one.engine) for one in found] == [
        ("10.0.0.5:8000", "vllm-0@dp0", "both", "sglang"),
        ("10.0.0.5:8001", "vllm-0@dp1", "both", "sglang"),
    ]
    assert parse_endpoint("[fd00::1]:80") == [
        Endpoint("[fd00::1]:80", "[fd00::1]:80", metrics="http://[fd00::1]:80/metrics")
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("10.0.0.5", "HOST:PORT"),
        ("10.0.0.5:0", "HOST:PORT"),
        ("fd00::1:80", "brackets"),
        ("h:1,colour=red", "colour=red"),
        ("h:1,role=boss", "role='boss'"),
        ("h:1,engine=x", "engine='x'"),
        ("h:65535,ranks=2", "ranks='2'"),
    ],
)
def test_bad_spec_names_the_part(text: str, part: str) -> None:
    with pytest.raises(SettingsError, match="endpoint") as error:
        parse_endpoint(text)
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["e.yaml", "e.toml", "e.json"])
def test_file_of_each_kind(tmp_path: Path, name: str) -> None:
    texts = {
        "e.yaml": "endpoints:\n- 10.0.0.5:8000,pod=a\n",
        "e.toml": 'endpoints = ["10.0.0.5:8000,pod=a"]\n',
        "e.json": json.dumps({"endpoints": ["10.0.0.5:8000,pod=a"]}),
    }
    path = tmp_path / name
    path.write_text(texts[name])
    assert [one.pod for one in read_endpoints(path)] == ["a"]
    path.write_text("5")
    with pytest.raises(SettingsError, match=name):
        read_endpoints(path)


async def test_name_that_does_not_resolve_is_said() -> None:
    assert [one.address for one in await resolve("127.0.0.1:80,model=m")] == ["127.0.0.1:80"]
    with pytest.raises(UnresolvedError):
        await resolve("no-such-host.invalid:80")


def test_pods_known_from_events() -> None:
    records = [
        PodRecord(pod="10.0.0.7:8000", writer="bridge", model="m"),
        PodRecord(pod="vllm-1@dp1", writer="bridge", endpoint="tcp://10.0.0.8:5558"),
        PodRecord(pod="vllm-2", writer="bridge", endpoint="tcp://10.0.0.9:5557", state="gone"),
        PodRecord(pod="bound", writer="bridge"),
    ]
    found = from_pods(records, 9000)
    assert [(one.address, one.pod, one.ready) for one in found] == [
        ("10.0.0.7:8000", "10.0.0.7:8000", True),
        ("10.0.0.8:9001", "vllm-1@dp1", True),
        ("10.0.0.9:9000", "vllm-2", False),
    ]
    assert [one.pod for one in from_pods(records, 0)] == ["10.0.0.7:8000"]


def test_sources_are_joined_by_address_and_learn_their_model() -> None:
    first, second = Endpoint("a:1", "pod-a"), Endpoint("a:1", "other")
    pods = {"pod-a": PodRecord(pod="pod-a", writer="bridge", model="m")}
    assert merged([[first], [second]], pods) == [first._replace(model="m")]


def test_pods_of_a_pool_are_known_by_their_address_where_topics_name_them_so() -> None:
    """llm-d's engines say ``kv@IP:PORT@MODEL``, a pool their names: one pod; a rank's id may carry its number too."""
    pool = endpoints_of(pod("p"), POOL)
    assert [one.pod for one in merged([pool], {})] == ["p@dp0", "p@dp1"]
    ids = ["10.0.0.5:8000", "10.0.0.5:8001@dp1"]
    pods = {name: PodRecord(pod=name, writer="bridge", model="m") for name in ids}
    assert [(one.pod, one.model) for one in merged([pool], pods)] == [(name, "m") for name in ids]
    pods["p@dp0"] = PodRecord(pod="p@dp0", writer="bridge")
    assert [one.pod for one in merged([pool], pods)] == ["p@dp0", "10.0.0.5:8001@dp1"]
    (alone,) = merged([parse_endpoint("10.0.0.5:8000,pod=p")], {"10.0.0.5:8000": pods["10.0.0.5:8000"]})
    assert alone.pod == "10.0.0.5:8000"


POOL: dict[str, Any] = {
    "metadata": {"namespace": "default", "name": "llama"},
    "spec": {
        "selector": {"matchLabels": {"app": "vllm", "a": "b"}},
        "targetPorts": [{"number": 8000}, {"number": 8001}],
    },
}


def pod(name: str, **meta: Any) -> dict[str, Any]:
    ready = meta.pop("ready", "True")
    return {
        "metadata": {"namespace": "default", "name": name, "uid": name, **meta},
        "status": {"podIP": "10.0.0.5", "conditions": [{"type": "Ready", "status": ready}]},
    }


def test_every_ready_pod_and_port_of_a_pool_is_an_endpoint() -> None:
    assert selector_of(POOL) == "a=b,app=vllm"
    found = endpoints_of(pod("p", labels={"llm-d.ai/role": "decode", "llm-d.ai/engine-type": "sglang"}), POOL)
    assert [(one.address, one.pod, one.role, one.engine, one.ready) for one in found] == [
        ("10.0.0.5:8000", "p@dp0", "decode", "sglang", True),
        ("10.0.0.5:8001", "p@dp1", "decode", "sglang", True),
    ]
    limited = endpoints_of(pod("p", annotations={"inference.networking.k8s.io/active-ports": "8001"}), POOL)
    assert [one.pod for one in limited] == ["p@dp1"]
    assert endpoints_of(pod("p", deletionTimestamp="now"), POOL) == []
    assert not any(one.ready for one in endpoints_of(pod("p", ready="False"), POOL))


def test_pool_without_labels_would_take_every_pod() -> None:
    with pytest.raises(SettingsError, match="matchLabels"):
        selector_of({"metadata": {"name": "x"}, "spec": {}})


def test_pool_follows_its_watch() -> None:
    state = PoolState()
    assert state.endpoints() == []
    state.pool = POOL
    state.listed([pod("a")])
    state.changed("ADDED", pod("b"))
    state.changed("DELETED", pod("a"))
    assert {one.pod for one in state.endpoints()} == {"b@dp0", "b@dp1"}
