"""A small Kubernetes API server: pods, listed and watched over HTTP as the real one does it."""

from __future__ import annotations

import json
import queue
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


def pod(name: str, address: str = "10.0.0.1", *, ready: bool = True, **more: Any) -> dict[str, Any]:
    """Return a pod as the API describes it; ``notes`` are annotations with the product's prefix."""
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

    def drop_watches(self) -> None:
        """Cut every watch in the middle of a line, as a network does."""
        with self.lock:
            for watch in self.watches:
                watch.put("drop")

    def forget(self) -> None:
        """Keep no history: a watch from before now is told that it is too old (410)."""
        with self.lock:
            self.version += 100
            self.oldest = self.version
            self.log.clear()

    def kubeconfig(self, folder: Path) -> str:
        """Write a configuration that leads here; returns its path."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}],
            "users": [{"name": "test", "user": {}}],
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config))
        return str(path)

    def close(self) -> None:
        """End the server and its watches."""
        self.break_watches()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
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
                    if event == "drop":
                        handler.wfile.write(b'ff\r\n{"type": "ADDED", "obj')
                        handler.connection.shutdown(socket.SHUT_RDWR)
                        return
                    send(*event)
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass
        finally:
            with self.lock:
                self.watches.remove(events)
