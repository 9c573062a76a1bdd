"""Engines from Kubernetes: pods by label selector, through the official client's watch.

A thread lists the pods and then watches from there; when the watch breaks or its place is too old (410), it lists
again. A pod is taken once it is ready, and kept while it runs: an engine that fails its readiness for a while still
has its cache. Annotations of a pod (prefix ``kvatlas.io/`` by default) say what an endpoint spec says: ``port``,
``replay-port``, ``model``, ``engine``, ``dp``, ``store``, ``announcements``,
``blocks-per-chunk``.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvatlas.bridge.engines.spec import EngineSpec, engine_specs
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings

_WATCH_SECONDS: Final = 240
_CONNECT_SECONDS: Final = 10
_BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
_OPTIONS: Final = ("model", "engine", "dp", "store", "announcements", "blocks-per-chunk")

log = logging.getLogger(__name__)


def pod_specs(pod: Mapping[str, Any], settings: BridgeSettings) -> list[EngineSpec]:
    """Return the endpoints of a pod (as the API describes it); empty when it has no address.

    Raises:
        SettingsError: an annotation is not valid.
    """
    meta = pod.get("metadata") or {}
    address = (pod.get("status") or {}).get("podIP")
    if not address:
        return []
    notes = meta.get("annotations") or {}
    prefix = settings.kubernetes_annotations
    host = f"[{address}]" if ":" in address else address
    port = notes.get(f"{prefix}port", str(settings.kubernetes_port))
    replay = notes.get(f"{prefix}replay-port", str(settings.kubernetes_replay_port))
    options = {name.replace("-", "_"): str(notes[prefix + name]) for name in _OPTIONS if prefix + name in notes}
    options["pod"] = str(meta.get("name", ""))
    where = f"pod {meta.get('namespace', '')}/{meta.get('name', '')}"
    return engine_specs(where, f"tcp://{host}:{port}", "" if replay in ("", "0") else f"tcp://{host}:{replay}", options)


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Tell whether a pod says that it is ready."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def is_over(pod: Mapping[str, Any]) -> bool:
    """Tell whether a pod has ended or is being deleted."""
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return ended or bool((pod.get("metadata") or {}).get("deletionTimestamp"))


class KubernetesPods:
    """The pods that count, as list and watch tell them."""

    def __init__(self, settings: BridgeSettings) -> None:
        """Start with none."""
        self._settings = settings
        self._pods: dict[str, list[EngineSpec]] = {}

    def specs(self) -> list[EngineSpec]:
        """Return all endpoints."""
        return [spec for specs in list(self._pods.values()) for spec in specs]

    def listed(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list."""
        present = {_uid(pod) for pod in pods}
        for uid in self._pods.keys() - present:
            del self._pods[uid]
        for pod in pods:
            self.changed("MODIFIED", pod)

    def changed(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of a watch."""
        uid = _uid(pod)
        if kind == "DELETED" or is_over(pod):
            self._pods.pop(uid, None)
        elif kind in ("ADDED", "MODIFIED") and (uid in self._pods or is_ready(pod)):
            try:
                self._pods[uid] = pod_specs(pod, self._settings)
            except SettingsError as error:
                log.error("%s; left out", error)


def _uid(pod: Mapping[str, Any]) -> str:
    meta = pod.get("metadata") or {}
    return str(meta.get("uid") or f"{meta.get('namespace')}/{meta.get('name')}")


class PodWatch:
    """Follows the pods of a cluster in a thread.

    Attributes:
        listed: set once the pods have been listed.
        failed: what ended the watch for good; None while it goes on.
    """

    def __init__(self, settings: BridgeSettings, changed: Callable[[], None]) -> None:
        """Describe the watch; ``changed`` is called in the thread.

        Raises:
            SettingsError: the client is not installed, or its configuration cannot be used.
        """
        self._settings = settings
        self._changed = changed
        self._table = KubernetesPods(settings)
        self._api = _api(settings)
        self._closing = threading.Event()
        self.listed = threading.Event()
        self._watch: Any = None
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kubernetes", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a watch that is waiting is left to the process's end."""
        self._closing.set()
        if self._watch is not None:
            self._watch.stop()
        self._thread.join(0.5)

    def specs(self) -> list[EngineSpec]:
        """Return the endpoints known now; while the API is away, those of before."""
        return self._table.specs()

    def _run(self) -> None:
        try:
            self._watch_pods()
        except Exception as error:  # noqa: BLE001 # the bridge ends of it, whatever it is
            self.failed = error

    def _watch_pods(self) -> None:
        from kubernetes.client.exceptions import ApiException  # noqa: PLC0415 - an optional dependency
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 - comes with it

        failed = 0
        while not self._closing.is_set():
            try:
                version = self._list()
                failed = 0
                while not self._closing.is_set():
                    version = self._follow(version)
            except ApiException as error:
                if error.status != 410:
                    log.warning("Kubernetes: %s %s; listing again", error.status, error.reason)
            except (HTTPError, OSError, ValueError, KeyError) as error:
                log.warning("Kubernetes: %s; listing again", error)
            self._closing.wait(_BACKOFF_SECONDS[min(failed, len(_BACKOFF_SECONDS) - 1)])
            failed += 1

    def _call(self) -> tuple[Any, dict[str, Any]]:
        options = {"label_selector": self._settings.kubernetes_selector}
        namespace = self._settings.kubernetes_namespace
        if namespace:
            return self._api.list_namespaced_pod, {**options, "namespace": namespace}
        return self._api.list_pod_for_all_namespaces, options

    def _list(self) -> str:
        call, options = self._call()
        reply = call(**options, _preload_content=False, _request_timeout=(_CONNECT_SECONDS, 60))
        found = json.loads(reply.data)
        self._table.listed(found.get("items") or [])
        self.listed.set()
        self._changed()
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        """Watch until the server ends it; returns where it ended."""
        from kubernetes import watch  # noqa: PLC0415 - an optional dependency

        call, options = self._call()
        self._watch = watch.Watch()  # type: ignore[no-untyped-call]
        events = self._watch.stream(
            call,
            **options,
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
                self._table.changed(event["type"], pod)
                self._changed()
            if self._closing.is_set():
                break
        return version


def _api(settings: BridgeSettings) -> Any:
    try:
        from kubernetes import client, config  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SettingsError(f"discovery from Kubernetes needs the extra kvatlas[kubernetes]: {error}") from error
    configuration = client.Configuration()
    try:
        if settings.kubernetes_config:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=settings.kubernetes_config, client_configuration=configuration
            )
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise SettingsError(f"no access to Kubernetes: {error}; set bridge.kubernetes_config outside a pod") from error
    configuration.client_side_validation = False  # the server's answers are judged here
    return client.CoreV1Api(client.ApiClient(configuration))
