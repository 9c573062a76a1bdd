"""Discovery from Kubernetes, against a small API server that speaks list and watch over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvatlas.bridge.engines.kubernetes import KubernetesPods, PodWatch, pod_specs
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings
from tests.bridge.engines.kubernetes_api import Api, pod
from tests.waiting import wait_until


@pytest.fixture
def api() -> Iterator[Api]:
    """An API server of one test."""
    api = Api()
    yield api
    api.close()


@pytest.fixture
def settings(api: Api, tmp_path: Path) -> BridgeSettings:
    """Settings that lead to the test's API server."""
    return BridgeSettings(kubernetes_selector="app=vllm", kubernetes_config=api.kubeconfig(tmp_path))


@pytest.fixture
def watch(settings: BridgeSettings) -> Iterator[PodWatch]:
    """A running watch."""
    watch = PodWatch(settings, lambda: None)
    watch.start()
    assert watch.listed.wait(90)
    yield watch
    watch.stop()


def _names(watch: PodWatch) -> set[str]:
    return {spec.pod for spec in watch.specs()}


def test_annotations_say_what_a_spec_says() -> None:
    """Ports, model, adapter and ranks come from annotations, the rest from settings."""
    settings = BridgeSettings()
    notes = {
        "port": "6000",
        "replay_port": "7000",
        "model": "org/m",
        "dp": "2",
        "store": "s",
        "announcements": "presence",
    }
    first, second = pod_specs(pod("a", notes=notes), settings)
    assert first == EngineSpec(
        live="tcp://10.0.0.1:6000",
        replay="tcp://10.0.0.1:7000",
        pod="a",
        model="org/m",
        ranks=2,
        store="s",
        announcements="presence",
    )
    assert (second.live, second.replay, second.rank) == ("tcp://10.0.0.1:6001", "tcp://10.0.0.1:7001", 1)
    assert pod_specs(pod("b", "fd00::1", notes={"replay_port": "0"}), settings)[0].live == "tcp://[fd00::1]:5557"
    assert pod_specs(pod("b", notes={"replay_port": "0"}), settings)[0].replay == ""
    assert pod_specs(pod("b", notes={"metrics_port": "8000"}), settings)[0].metrics == "http://10.0.0.1:8000/metrics"
    assert pod_specs(pod("c", ""), settings) == []
    with pytest.raises(SettingsError, match="serving/d"):
        pod_specs(pod("d", notes={"engine": "other"}), settings)


def test_a_pod_with_an_http_port_tells_its_endpoints_itself() -> None:
    """Its own annotations go before the settings, the HTTP port before the sockets'."""
    asking = BridgeSettings(kubernetes_http_port=8000)
    assert pod_specs(pod("a"), asking) == "http://10.0.0.1:8000,pod=a"
    assert pod_specs(pod("a", "fd00::1", notes={"store": "s"}), asking) == "http://[fd00::1]:8000,store=s,pod=a"
    assert pod_specs(pod("a", notes={"http_port": "9", "port": "7"}), BridgeSettings()) == "http://10.0.0.1:9,pod=a"
    for notes in ({"port": "6000"}, {"http_port": "0"}):
        (spec,) = pod_specs(pod("a", notes=notes), asking)
        assert isinstance(spec, EngineSpec)
    bad = ({"dp": "2"}, {"engine": "sglang"}, {"store": "s,t"}, {"announcements": "some"}, {"http_port": "70000"})
    for notes in bad:
        with pytest.raises(SettingsError, match="pod serving/a"):
            pod_specs(pod("a", notes=notes), asking)
    table = KubernetesPods(asking)
    table.listed([pod("a"), pod("b", notes={"port": "1"}), pod("c", notes={"dp": "2"})])
    assert (table.asked(), [spec.pod for spec in table.specs()]) == (["http://10.0.0.1:8000,pod=a"], ["b"])


def test_a_pod_counts_from_ready_until_it_ends() -> None:
    """Not ready at first: left out; not ready later: kept; ended, being deleted or bad annotations: left out."""
    table = KubernetesPods(BridgeSettings())
    table.changed("ADDED", pod("a", ready=False))
    assert table.specs() == []
    table.changed("MODIFIED", pod("a"))
    table.changed("MODIFIED", pod("a", ready=False))
    assert len(table.specs()) == 1
    table.changed("MODIFIED", pod("a", meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}))
    assert table.specs() == []
    table.changed("ADDED", pod("b"))
    table.changed("MODIFIED", pod("b", phase="Failed"))
    table.changed("ADDED", pod("c", notes={"port": "no"}))
    assert table.specs() == []


def test_pods_come_and_go_by_watch(api: Api, watch: PodWatch) -> None:
    """Added, ready and deleted pods are followed, with the selector that was asked for."""
    api.change("ADDED", pod("a", ready=False))
    api.change("ADDED", pod("b", "10.0.0.2"))
    wait_until(lambda: _names(watch) == {"b"})
    api.change("MODIFIED", pod("a"))
    wait_until(lambda: _names(watch) == {"a", "b"})
    api.change("DELETED", pod("b", "10.0.0.2"))
    wait_until(lambda: _names(watch) == {"a"})
    assert {path for path, _ in api.asked} == {"/api/v1/pods"}
    assert all(query["labelSelector"] == ["app=vllm"] for _, query in api.asked)


def test_a_broken_watch_goes_on_where_it_ended(api: Api, watch: PodWatch) -> None:
    """When the server ends a watch, the next one starts at the last version seen, bookmarks included."""
    api.change("ADDED", pod("a"))
    wait_until(lambda: _names(watch) == {"a"})
    bookmark = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": ""}, "spec": {"containers": None}, "status": {}}
    api.change("BOOKMARK", bookmark)
    last = api.version
    wait_until(lambda: bool(api.watches))  # what it was told comes before its end
    api.break_watches()
    wait_until(lambda: [q["resourceVersion"] for _, q in api.asked if "watch" in q][-1] == [str(last)])
    api.change("ADDED", pod("b"))
    wait_until(lambda: _names(watch) == {"a", "b"})
    assert len([query for _, query in api.asked if "watch" not in query]) == 1


def test_a_watch_that_is_cut_lists_again(api: Api, watch: PodWatch) -> None:
    """A connection that breaks in the middle of an event costs nothing: what came and went meanwhile is known."""
    api.change("ADDED", pod("a"))
    wait_until(lambda: _names(watch) == {"a"})
    api.drop_watches()
    api.change("ADDED", pod("b"))
    api.change("DELETED", pod("a"))
    wait_until(lambda: _names(watch) == {"b"})


def test_an_expired_version_lists_again(api: Api, watch: PodWatch) -> None:
    """After 410 the pods are listed again, and what left meanwhile is gone."""
    api.change("ADDED", pod("a"))
    api.change("ADDED", pod("b"))
    wait_until(lambda: _names(watch) == {"a", "b"})
    del api.pods["a"]
    api.forget()
    api.break_watches()
    wait_until(lambda: _names(watch) == {"b"})


def test_an_api_that_is_away_changes_nothing(settings: BridgeSettings, api: Api) -> None:
    """While the API cannot be reached the pods of before are kept."""
    api.change("ADDED", pod("a"))
    watch = PodWatch(settings, lambda: None)
    watch.start()
    assert watch.listed.wait(90)
    api.server.shutdown()
    api.server.server_close()
    api.break_watches()
    time.sleep(0.5)
    assert _names(watch) == {"a"}
    watch.stop()


def test_a_namespace_is_asked_for_alone(settings: BridgeSettings, api: Api) -> None:
    """With a namespace only its pods are listed and watched."""
    watch = PodWatch(msgspec.structs.replace(settings, kubernetes_namespace="serving"), lambda: None)
    watch.start()
    wait_until(lambda: len(api.asked) >= 2)
    watch.stop()
    assert {path for path, _ in api.asked} == {"/api/v1/namespaces/serving/pods"}


def test_no_access_is_said_at_once(tmp_path: Path) -> None:
    """Without a service account and without a kubeconfig the bridge does not start."""
    with pytest.raises(SettingsError, match="kubernetes_config"):
        PodWatch(BridgeSettings(kubernetes_selector="a=b"), lambda: None)
    with pytest.raises(SettingsError, match="Kubernetes"):
        PodWatch(BridgeSettings(kubernetes_selector="a=b", kubernetes_config=str(tmp_path / "none")), lambda: None)
