"""Pods of an InferencePool: every ready pod of its selector on every target port is an endpoint.

The pool (``inference.networking.k8s.io/v1``) is read anew when it changes; its pods are listed and watched with its
selector in its namespace. Annotations limit a pod's ports (``inference.networking.k8s.io/active-ports`` or
``llm-d.ai/active-ports``), labels tell role and engine (``llm-d.ai/role``, ``llm-d.ai/engine-type``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from kvatlas.bridge.engines.kubernetes_watch import (
    CONNECT_SECONDS,
    PodWatcher,
    api_client,
    is_ready,
    name_of,
    uid_of,
)
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import port_of
from kvatlas.scorer.gateway.discovery import joined
from kvatlas.scorer.picker.endpoints import ROLES, Endpoint

GROUP: Final = "inference.networking.k8s.io"
_PORT_NOTES: Final = (f"{GROUP}/active-ports", "llm-d.ai/active-ports")
_ENGINE_LABELS: Final = ("llm-d.ai/engine-type", f"{GROUP}/engine-type")
_ROLE_LABEL: Final = "llm-d.ai/role"
_ENGINES: Final = ("vllm", "sglang")


def selector_of(pool: Mapping[str, Any]) -> str:
    """Return a pool's label selector as the API takes it.

    Raises:
        SettingsError: the pool has no labels to match; every pod of the namespace would be taken.
    """
    labels = ((pool.get("spec") or {}).get("selector") or {}).get("matchLabels") or {}
    if not labels:
        raise SettingsError(f"InferencePool {name_of(pool)}: selector.matchLabels is empty")
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
    ready = is_ready(pod)
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
            return {port for part in str(notes[name]).split(",") if (port := port_of(part.strip())) is not None}
    return None


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
        self._pods = {uid_of(pod): pod for pod in pods}

    def changed(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of the pods' watch."""
        if kind == "DELETED":
            self._pods.pop(uid_of(pod), None)
        elif kind in ("ADDED", "MODIFIED"):
            self._pods[uid_of(pod)] = pod

    def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, those that are not ready included."""
        pool = self.pool
        if pool is None:
            return []
        return [endpoint for pod in list(self._pods.values()) for endpoint in endpoints_of(pod, pool)]


class PoolWatch(PodWatcher):
    """Follows an InferencePool and its pods.

    Args:
        pool: ``NAMESPACE/NAME``.
        config: kubeconfig file; empty: the pod's own service account.
        changed: called in the thread after every change.

    Raises:
        SettingsError: the client is not installed, or its configuration cannot be used.
    """

    def __init__(self, pool: str, config: str, changed: Callable[[], None]) -> None:
        super().__init__("inference-pool", changed)
        self._namespace, _, self._name = pool.partition("/")
        self._client = api_client(config, user="an InferencePool", setting="picker.kubernetes_config")
        self._read: Mapping[str, Any] = {}
        self.state = PoolState()

    def _list(self) -> str:
        """List again, by the pool's selector as it is now."""
        self._read = self._read_pool()
        return super()._list()

    def source(self) -> tuple[Any, dict[str, Any]]:
        """Return the call that lists the pool's pods."""
        from kubernetes import client  # noqa: PLC0415 - an optional dependency

        options = {"namespace": self._namespace, "label_selector": selector_of(self._read)}
        return client.CoreV1Api(self._client).list_namespaced_pod, options

    def take_all(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list, with the pool that it is of."""
        self.state.listed(pods)
        self.state.pool = self._read

    def take(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of the watch."""
        self.state.changed(kind, pod)

    def outdated(self) -> bool:
        """Tell whether selector or ports are not those that the pods were listed with."""
        return self._read_pool().get("spec") != self._read.get("spec")

    def _read_pool(self) -> dict[str, Any]:
        from kubernetes import client  # noqa: PLC0415 - an optional dependency

        found: Any = client.CustomObjectsApi(self._client).get_namespaced_custom_object(
            GROUP, "v1", self._namespace, "inferencepools", self._name, _request_timeout=(CONNECT_SECONDS, 30)
        )
        return dict(found)
