"""List and watch of pods through the official Kubernetes client, in a thread.

The pods are listed and then watched from there; when the watch breaks or its place is too old (410), they are listed
again. What is followed and what becomes of it is a subclass's.
"""

from __future__ import annotations

import abc
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvatlas.bridge.errors import SettingsError

CONNECT_SECONDS: Final = 10
_WATCH_SECONDS: Final = 240
_BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)

log = logging.getLogger(__name__)


def name_of(found: Mapping[str, Any]) -> str:
    """Return ``NAMESPACE/NAME`` of an object as the API describes it."""
    meta = found.get("metadata") or {}
    return f"{meta.get('namespace', '')}/{meta.get('name', '')}"


def uid_of(pod: Mapping[str, Any]) -> str:
    """Return what tells a pod from every other, also from one of its name before it."""
    return str((pod.get("metadata") or {}).get("uid") or name_of(pod))


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Tell whether a pod says that it is ready."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


class PodWatcher(abc.ABC):
    """Follows pods of a cluster in a thread.

    Args:
        name: of the thread.
        changed: called in the thread after every change.

    Attributes:
        listed: set once the pods have been listed.
        failed: what ended the watch for good; None while it goes on.
    """

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._closing = threading.Event()
        self.listed = threading.Event()
        self._watch: Any = None
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abc.abstractmethod
    def source(self) -> tuple[Any, dict[str, Any]]:
        """Return the client's call that lists the pods, and its arguments."""

    @abc.abstractmethod
    def take_all(self, pods: list[dict[str, Any]]) -> None:
        """Take a full list."""

    @abc.abstractmethod
    def take(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take one event of the watch."""

    def outdated(self) -> bool:
        """Tell whether the pods have to be listed anew; asked whenever the server has ended a watch."""
        return False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a watch that is waiting is left to the process's end."""
        self._closing.set()
        if self._watch is not None:
            self._watch.stop()
        self._thread.join(0.5)

    def _run(self) -> None:
        try:
            self._watch_pods()
        except Exception as error:  # noqa: BLE001 # whoever uses it ends of it, whatever it is
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
                    if self.outdated():
                        break
            except ApiException as error:
                if error.status != 410:
                    log.warning("Kubernetes: %s %s; listing again", error.status, error.reason)
            except (HTTPError, OSError, ValueError, KeyError, SettingsError) as error:
                log.warning("Kubernetes: %s; listing again", error)
            self._closing.wait(_BACKOFF_SECONDS[min(failed, len(_BACKOFF_SECONDS) - 1)])
            failed += 1

    def _list(self) -> str:
        call, options = self.source()
        reply = call(**options, _preload_content=False, _request_timeout=(CONNECT_SECONDS, 60))
        found = json.loads(reply.data)
        self.take_all(found.get("items") or [])
        self.listed.set()
        self._changed()
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        """Watch until the server ends it; returns where it ended."""
        from kubernetes import watch  # noqa: PLC0415 - an optional dependency

        call, options = self.source()
        self._watch = watch.Watch()  # type: ignore[no-untyped-call]
        events = self._watch.stream(
            call,
            **options,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(CONNECT_SECONDS, _WATCH_SECONDS + 30),
        )
        for event in events:
            if event is None:  # a line that is no JSON
                continue
            pod = event["raw_object"]
            version = (pod.get("metadata") or {}).get("resourceVersion") or version
            if event["type"] != "BOOKMARK":
                self.take(event["type"], pod)
                self._changed()
            if self._closing.is_set():
                break
        return version


def api_client(config_file: str, *, user: str, setting: str) -> Any:
    """Return the official client, connected by a kubeconfig file or by the pod's own service account.

    Args:
        config_file: the kubeconfig file; empty for the service account.
        user: what needs it, for the error.
        setting: name of the setting that gives the file, for the error.

    Raises:
        SettingsError: the client is not installed, or its configuration cannot be used.
    """
    try:
        from kubernetes import client, config  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SettingsError(f"{user} needs the extra kvatlas[kubernetes]: {error}") from error
    configuration = client.Configuration()
    try:
        if config_file:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=config_file, client_configuration=configuration
            )
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise SettingsError(f"no access to Kubernetes: {error}; set {setting} outside a pod") from error
    configuration.client_side_validation = False  # the server's answers are judged here
    return client.ApiClient(configuration)
