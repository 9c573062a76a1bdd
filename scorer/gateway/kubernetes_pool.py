"""Pods of an InferencePool: every ready pod of its selector on every target port is an endpoint.

The pool (``inference.networking.k8s.io/v1``) is read anew when it changes; its pods are listed and watched with its
selector in its namespace. Annotations limit a pod's ports (``inference.networking.k8s.io/active-ports`` or
``llm-d.ai/active-ports``), labels tell role and engine (``llm-d.ai/role``, ``llm-d.ai/engine-type``).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.gateway.discovery import joined
from kvatlas.scorer.picker.endpoints import ROLES, Endpoint

GROUP: Final = "inference.networking.k8s.io"
_PORT_NOTES: Final = (f"{GROUP}/active-ports", "llm-d.ai/active-ports")
_ENGINE_LABELS: Final = ("llm-d.ai/engine-type", f"{GROUP}/engine-type")
_ROLE_LABEL: Final = "llm-d.ai/role"
_ENGINES: Final = ("vllm", "sglang")
_WATCH_SECONDS: Final = 240
_CONNECT_SECONDS: Final = 10
_BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)

log = logging.getLogger(__name__)


def selector_of(pool: Mapping[str, Any]) -> str:
    """Return a pool's label selector as the API takes it.

    Raises:
        SettingsError: the pool has no labels to match; every pod of the namespace would be taken.
    """
    labels = ((pool.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
    if not labels:
        raise SettingsError(f"InferencePool {_name(pool)}: selector.matchLabels is empty")
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))


def ports_of(pool: Mapping[str, Any]) -> list[int]:
    """Return a pool's target ports, in order."""
    entries = (pool.get("spec") or {}).get("targetPorts") or []
    return [int(entry["number"]) for entry in entries if isinstance(entry, Mapping) and "number" in entry]


def endpoints_of(pod: Mapping[str, Any], pool: Mapping[str, Any]) -> list[Endpoint]:
    """Return a pod's endpoints, one per target port; none when it has no address or is being deleted."""
    meta, status = pod.get("metadata") or {}, pod.get("status") or {}
    address = status.get("podIP")
    if not address or meta.get("deletionTimestamp"):
        return []
    ports = ports_of(pool)
    active = _active(meta.get("annotations") or {})
    labels = meta.get("labels") or {}
    engine = next((labels[name] for name in _ENGINE_LABELS if labels.get(name) in _ENGINES), "vllm")
    conditions = status.get("conditions") or []
    ready = any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)
    found = []
    for rank, port in enumerate(ports):
        if active is not None and port not in active:
            continue
        here = joined(str(address), port)
        name = str(meta.get("name", ""))
        found.append(
            Endpoint(
                address=here,
                pod=f"{name}@dp{rank}" if len(ports) > 1 else name,
                role=ROLES.get(str(labels.get(_ROLE_LABEL, "")), "both"),
                ready=ready,
                engine=engine,
                metrics=f"http://{here}/metrics",
            )
        )
    return found


def _active(notes: Mapping[str, Any]) -> set[int] | None:
    for name in _PORT_NOTES:
        if name in notes:
            return {int(part) for part in str(notes[name]).split(",") if part.strip().isdecimal()}
    return None


def _name(found: Mapping[str, Any]) -> str:
    meta = found.get("metadata") or {}
    return f"{meta.get('namespace', '')}/{meta.get('name', '')}"


class PoolState:
    """A pool with its pods, as list and watch tell them.

    Attributes:
        pool: the pool as the API describes it, None until it was read.
    """

    def __init__(self) -> None:
        self.pool: Mapping[str, Any] | None = None
        self._pods: dict[str, Mapping[str, Any]] = {}

    def listed(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list of pods."""
        self._pods = {_uid(pod): pod for pod in pods}

    def changed(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of the pods' watch."""
        if kind == "DELETED":
            self._pods.pop(_uid(pod), None)
        elif kind in ("ADDED", "MODIFIED"):
            self._pods[_uid(pod)] = pod

    def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, those that are not ready included."""
        pool = self.pool
        if pool is None:
            return []
        return [endpoint for pod in list(self._pods.values()) for endpoint in endpoints_of(pod, pool)]


def _uid(pod: Mapping[str, Any]) -> str:
    return str((pod.get("metadata") or {}).get("uid") or _name(pod))


class PoolWatch:
    """Follows an InferencePool and its pods in a thread.

    Args:
        pool: ``NAMESPACE/NAME``.
        config: kubeconfig file; empty: the pod's own service account.
        changed: called in the thread after every change.

    Attributes:
        listed: set once pool and pods have been read.
    """

    def __init__(self, pool: str, config: str, changed: Callable[[], None]) -> None:
        self._namespace, _, self._name = pool.partition("/")
        self._changed = changed
        self._client = _client(config)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inference-pool", daemon=True)
        self.state = PoolState()
        self.listed = threading.Event()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a watch that waits is left to the process's end."""
        self._closing.set()
        self._thread.join(0.5)

    def _run(self) -> None:
        from kubernetes.client.exceptions import ApiException  # noqa: PLC0415 - an optional dependency
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 - comes with it

        failed = 0
        while not self._closing.is_set():
            try:
                version = self._list()
                failed = 0
                while not self._closing.is_set():
                    version = self._follow(version)
                    if self._pool_changed():
                        break
            except ApiException as error:
                if error.status != 410:
                    log.warning("Kubernetes: %s %s; listing again", error.status, error.reason)
            except (HTTPError, OSError, ValueError, KeyError, SettingsError) as error:
                log.warning("Kubernetes: %s; listing again", error)
            self._closing.wait(_BACKOFF_SECONDS[min(failed, len(_BACKOFF_SECONDS) - 1)])
            failed += 1

    def _read_pool(self) -> dict[str, Any]:
        from kubernetes import client  # noqa: PLC0415 - an optional dependency

        found: Any = client.CustomObjectsApi(self._client).get_namespaced_custom_object(
            GROUP, "v1", self._namespace, "inferencepools", self._name, _request_timeout=(_CONNECT_SECONDS, 30)
        )
        return dict(found)

    def _pool_changed(self) -> bool:
        """Whether selector or ports are not those that the pods were listed with."""
        now, before = self._read_pool(), self.state.pool or {}
        return now.get("spec") != before.get("spec")

    def _list(self) -> str:
        from kubernetes import client  # noqa: PLC0415 - an optional dependency

        pool = self._read_pool()
        reply: Any = client.CoreV1Api(self._client).list_namespaced_pod(
            self._namespace,
            label_selector=selector_of(pool),
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, 60),
        )
        found = json.loads(reply.data)
        self.state.listed(found.get("items") or [])
        self.state.pool = pool
        self.listed.set()
        self._changed()
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        """Watch the pods until the server ends it; returns where it ended."""
        from kubernetes import client, watch  # noqa: PLC0415 - an optional dependency

        events = watch.Watch().stream(  # type: ignore[no-untyped-call]
            client.CoreV1Api(self._client).list_namespaced_pod,
            namespace=self._namespace,
            label_selector=selector_of(self.state.pool or {}),
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(_CONNECT_SECONDS, _WATCH_SECONDS + 30),
        )
        for event in events:
            if event is None:  # a line that is no JSON
                continue
            pod = event["raw_object"]
            version = (pod.get("metadata") or {}).get("resourceVersion") or version
            if event["type"] != "BOOKMARK":
                self.state.changed(event["type"], pod)
                self._changed()
            if self._closing.is_set():
                break
        return version


def _client(config_file: str) -> Any:
    try:
        from kubernetes import client, config  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SettingsError(f"an InferencePool needs the extra kvatlas[kubernetes]: {error}") from error
    configuration = client.Configuration()
    try:
        if config_file:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=config_file, client_configuration=configuration
            )
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise SettingsError(f"no access to Kubernetes: {error}; set picker.kubernetes_config outside a pod") from error
    configuration.client_side_validation = False
    return client.ApiClient(configuration)
