"""Discovery from Kubernetes, against a small API server that speaks list and watch over HTTP."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings, EngineSpec
from kvatlas.bridge.pod_watch import PodTable, PodWatch, pod_specs


def _pod(name: str, address: str = "10.0.0.1", *, ready: bool = True, **more: Any) -> dict[str, Any]:
    notes = {f"kvatlas.io/{key.replace('_', '-')}": value for key, value in more.pop("notes", {}).items()}
    meta = {"name": name, "namespace": "serving", "uid": f"uid-{name}", "annotations": notes, **more.pop("meta", {})}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    status = {"podIP": address, "phase": "Running", "conditions": conditions, **more}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": meta, "spec": {"containers": []}, "status": status}


class Api:
    """Pods with a resource version, listed and watched as the real API server does it."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.oldest = 0
        self.log: list[tuple[int, str, dict[str, Any]]] = []
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.watches: list[queue.Queue[Any]] = []
        self.lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
                return

            def do_GET(self) -> None:
                api.serve(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def change(self, kind: str, pod: dict[str, Any]) -> None:
        """Change a pod and tell the watches."""
        with self.lock:
            self.version += 1
            pod = {**pod, "metadata": {**pod["metadata"], "resourceVersion": str(self.version)}}
            self.log.append((self.version, kind, pod))
            if kind == "DELETED":
                self.pods.pop(pod["metadata"]["name"], None)
            elif kind != "BOOKMARK":
                self.pods[pod["metadata"]["name"]] = pod
            for watch in self.watches:
                watch.put((kind, pod))

    def break_watches(self) -> None:
        """End every watch, as servers do from time to time."""
        with self.lock:
            for watch in self.watches:
                watch.put(None)

    def close(self) -> None:
        self.break_watches()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = parse_qs(parts.query)
        self.asked.append((parts.path, query))
        if query.get("watch", [""])[0].lower() == "true":
            self._watch(handler, int(query["resourceVersion"][0]))
            return
        with self.lock:
            document = {
                "kind": "PodList",
                "apiVersion": "v1",
                "metadata": {"resourceVersion": str(self.version)},
                "items": list(self.pods.values()),
            }
        body = json.dumps(document).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _watch(self, handler: BaseHTTPRequestHandler, version: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

        def send(kind: str, item: Any) -> None:
            line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            handler.wfile.flush()

        events: queue.Queue[Any] = queue.Queue()
        with self.lock:
            expired = version < self.oldest
            for number, kind, pod in self.log:
                if number > version:
                    events.put((kind, pod))
            self.watches.append(events)
        try:
            if expired:
                send("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
            else:
                while (event := events.get()) is not None:
                    send(*event)
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass
        finally:
            with self.lock:
                self.watches.remove(events)


@pytest.fixture
def api() -> Iterator[Api]:
    """An API server of one test."""
    api = Api()
    yield api
    api.close()


@pytest.fixture
def settings(api: Api, tmp_path: Path) -> BridgeSettings:
    """Settings that lead to the test's API server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{api.server.server_port}"}}],
        "users": [{"name": "test", "user": {}}],
    }
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    return BridgeSettings(kubernetes_selector="app=vllm", kubernetes_config=str(path))


@pytest.fixture
def watch(settings: BridgeSettings) -> Iterator[PodWatch]:
    """A running watch."""
    watch = PodWatch(settings, lambda: None)
    watch.start()
    assert watch.listed.wait(10)
    yield watch
    watch.stop()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


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
    first, second = pod_specs(_pod("a", notes=notes), settings)
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
    assert pod_specs(_pod("b", "fd00::1", notes={"replay_port": "0"}), settings)[0].live == "tcp://[fd00::1]:5557"
    assert pod_specs(_pod("b", notes={"replay_port": "0"}), settings)[0].replay == ""
    assert pod_specs(_pod("c", ""), settings) == []
    with pytest.raises(SettingsError, match="serving/d"):
        pod_specs(_pod("d", notes={"engine": "other"}), settings)


def test_a_pod_counts_from_ready_until_it_ends() -> None:
    """Not ready at first: left out; not ready later: kept; ended, being deleted or bad annotations: left out."""
    table = PodTable(BridgeSettings())
    table.changed("ADDED", _pod("a", ready=False))
    assert table.specs() == []
    table.changed("MODIFIED", _pod("a"))
    table.changed("MODIFIED", _pod("a", ready=False))
    assert len(table.specs()) == 1
    table.changed("MODIFIED", _pod("a", meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}))
    assert table.specs() == []
    table.changed("ADDED", _pod("b"))
    table.changed("MODIFIED", _pod("b", phase="Failed"))
    table.changed("ADDED", _pod("c", notes={"port": "no"}))
    assert table.specs() == []


def test_pods_come_and_go_by_watch(api: Api, watch: PodWatch) -> None:
    """Added, ready and deleted pods are followed, with the selector that was asked for."""
    api.change("ADDED", _pod("a", ready=False))
    api.change("ADDED", _pod("b", "10.0.0.2"))
    _until(lambda: _names(watch) == {"b"})
    api.change("MODIFIED", _pod("a"))
    _until(lambda: _names(watch) == {"a", "b"})
    api.change("DELETED", _pod("b", "10.0.0.2"))
    _until(lambda: _names(watch) == {"a"})
    assert {path for path, _ in api.asked} == {"/api/v1/pods"}
    assert all(query["labelSelector"] == ["app=vllm"] for _, query in api.asked)


def test_a_broken_watch_goes_on_where_it_ended(api: Api, watch: PodWatch) -> None:
    """When the server ends a watch, the next one starts at the last version seen, bookmarks included."""
    api.change("ADDED", _pod("a"))
    _until(lambda: _names(watch) == {"a"})
    bookmark = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": ""}, "spec": {"containers": None}, "status": {}}
    api.change("BOOKMARK", bookmark)
    last = api.version
    time.sleep(0.2)
    api.break_watches()
    _until(lambda: [q["resourceVersion"] for _, q in api.asked if "watch" in q][-1] == [str(last)])
    api.change("ADDED", _pod("b"))
    _until(lambda: _names(watch) == {"a", "b"})
    assert len([query for _, query in api.asked if "watch" not in query]) == 1


def test_an_expired_version_lists_again(api: Api, watch: PodWatch) -> None:
    """After 410 the pods are listed again, and what left meanwhile is gone."""
    api.change("ADDED", _pod("a"))
    api.change("ADDED", _pod("b"))
    _until(lambda: _names(watch) == {"a", "b"})
    with api.lock:
        del api.pods["a"]
        api.version += 100
        api.oldest = api.version
        api.log.clear()
    api.break_watches()
    _until(lambda: _names(watch) == {"b"})


def test_an_api_that_is_away_changes_nothing(settings: BridgeSettings, api: Api) -> None:
    """While the API cannot be reached the pods of before are kept."""
    api.change("ADDED", _pod("a"))
    watch = PodWatch(settings, lambda: None)
    watch.start()
    assert watch.listed.wait(10)
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
    _until(lambda: len(api.asked) >= 2)
    watch.stop()
    assert {path for path, _ in api.asked} == {"/api/v1/namespaces/serving/pods"}


def test_no_access_is_said_at_once(tmp_path: Path) -> None:
    """Without a service account and without a kubeconfig the bridge does not start."""
    with pytest.raises(SettingsError, match="kubernetes_config"):
        PodWatch(BridgeSettings(kubernetes_selector="a=b"), lambda: None)
    with pytest.raises(SettingsError, match="Kubernetes"):
        PodWatch(BridgeSettings(kubernetes_selector="a=b", kubernetes_config=str(tmp_path / "none")), lambda: None)
