"""Engines from Kubernetes: pods by label selector, through the official client's watch.

A pod is taken once it is ready, and kept while it runs: an engine that fails its readiness for a while still has its
cache. Annotations of a pod (prefix ``kvatlas.io/`` by default) say what an endpoint spec says: ``port``,
``replay-port``, ``metrics-port``, ``model``, ``engine``, ``dp``, ``store``, ``announcements``, ``blocks-per-chunk``,
``speculation``. With ``http-port`` the engine is asked where it publishes, as one listed by its HTTP address is; it
says the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvatlas.bridge.engines.http import parse_http
from kvatlas.bridge.engines.kubernetes_watch import PodWatcher, api_client, is_ready, uid_of
from kvatlas.bridge.engines.spec import HTTP_OPTIONS, EngineSpec, engine_specs
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings

#: What annotations of pods begin with.
_ANNOTATIONS: Final = "kvatlas.io/"
_OPTIONS: Final = ("model", "engine", "dp", "store", "announcements", "blocks-per-chunk", "speculation")

log = logging.getLogger(__name__)


def pod_specs(pod: Mapping[str, Any], settings: BridgeSettings) -> list[EngineSpec] | str:
    """Return the endpoints of a pod (as the API describes it), or the HTTP spec to ask for them.

    Returns:
        Endpoints, none when the pod has no address. A pod's own ports, of the HTTP API before those of the sockets, go
        before the settings'.

    Raises:
        SettingsError: an annotation is not valid.
    """
    meta = pod.get("metadata") or {}
    address = (pod.get("status") or {}).get("podIP")
    if not address:
        return []
    notes = meta.get("annotations") or {}
    prefix = _ANNOTATIONS
    host = f"[{address}]" if ":" in address else address
    port = notes.get(f"{prefix}port", str(settings.kubernetes_port))
    http_port = notes.get(f"{prefix}http-port", "0" if f"{prefix}port" in notes else str(settings.kubernetes_http_port))
    replay = notes.get(f"{prefix}replay-port", str(settings.kubernetes_replay_port))
    options = {name.replace("-", "_"): str(notes[prefix + name]) for name in _OPTIONS if prefix + name in notes}
    if (metrics_port := notes.get(f"{prefix}metrics-port", "")) and http_port in ("", "0"):
        options["metrics"] = f"http://{host}:{metrics_port}/metrics"
    options["pod"] = str(meta.get("name", ""))
    where = f"pod {meta.get('namespace', '')}/{meta.get('name', '')}"
    if http_port not in ("", "0"):
        return _http_spec(where, f"{host}:{http_port}", options)
    return engine_specs(where, f"tcp://{host}:{port}", "" if replay in ("", "0") else f"tcp://{host}:{replay}", options)


def _http_spec(where: str, address: str, options: dict[str, str]) -> str:
    told = sorted(options.keys() - set(HTTP_OPTIONS))
    if told:
        raise SettingsError(f"{where}: with an HTTP port the engine itself tells {', '.join(told)}: no annotation does")
    try:
        engine_specs(where, f"tcp://{address}", "", options)
        text = ",".join([f"http://{address}", *(f"{name}={value}" for name, value in options.items())])
        parse_http(text)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error
    return text


def is_over(pod: Mapping[str, Any]) -> bool:
    """Tell whether a pod has ended or is being deleted."""
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return ended or bool((pod.get("metadata") or {}).get("deletionTimestamp"))


class KubernetesPods:
    """The pods that count, as list and watch tell them."""

    def __init__(self, settings: BridgeSettings) -> None:
        """Start with none."""
        self._settings = settings
        self._pods: dict[str, list[EngineSpec] | str] = {}

    def specs(self) -> list[EngineSpec]:
        """Return all endpoints that the API tells."""
        return [spec for specs in list(self._pods.values()) if not isinstance(specs, str) for spec in specs]

    def asked(self) -> list[str]:
        """Return the HTTP specs of the engines that tell their endpoints themselves."""
        return [specs for specs in list(self._pods.values()) if isinstance(specs, str)]

    def listed(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list."""
        present = {uid_of(pod) for pod in pods}
        for uid in self._pods.keys() - present:
            del self._pods[uid]
        for pod in pods:
            self.changed("MODIFIED", pod)

    def changed(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of a watch."""
        uid = uid_of(pod)
        if kind == "DELETED" or is_over(pod):
            self._pods.pop(uid, None)
        elif kind in ("ADDED", "MODIFIED") and (uid in self._pods or is_ready(pod)):
            try:
                self._pods[uid] = pod_specs(pod, self._settings)
            except SettingsError as error:
                log.error("%s; left out", error)


class PodWatch(PodWatcher):
    """Follows the pods that run engines."""

    def __init__(self, settings: BridgeSettings, changed: Callable[[], None]) -> None:
        """Describe the watch; ``changed`` is called in the thread.

        Raises:
            SettingsError: the client is not installed, or its configuration cannot be used.
        """
        super().__init__("kubernetes", changed)
        self._settings = settings
        self._table = KubernetesPods(settings)
        self._api = _api(settings)

    def specs(self) -> list[EngineSpec]:
        """Return the endpoints known now; while the API is away, those of before."""
        return self._table.specs()

    def asked(self) -> list[str]:
        """Return the HTTP specs of the engines to ask, as :meth:`specs` returns the endpoints that need no asking."""
        return self._table.asked()

    def source(self) -> tuple[Any, dict[str, Any]]:
        """Return the call that lists the pods of the selector, in one namespace or in all."""
        options = {"label_selector": self._settings.kubernetes_selector}
        namespace = self._settings.kubernetes_namespace
        if namespace:
            return self._api.list_namespaced_pod, {**options, "namespace": namespace}
        return self._api.list_pod_for_all_namespaces, options

    def take_all(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list."""
        self._table.listed(pods)

    def take(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of the watch."""
        self._table.changed(kind, pod)


def _api(settings: BridgeSettings) -> Any:
    made = api_client(settings.kubernetes_config, user="discovery from Kubernetes", setting="bridge.kubernetes_config")
    from kubernetes import client  # noqa: PLC0415 - an optional dependency

    return client.CoreV1Api(made)
