"""An engine's HTTP API for tests: answers what it is given, on a port of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def fake_engine(answers: Mapping[str, Any]) -> Iterator[str]:
    """Serve ``answers`` until left; gives the address. Other paths are 404.

    Args:
        answers: path -> JSON value, or text, or what makes it of the body of a POST.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(answers.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            make = answers.get(self.path)
            self._answer(make(body) if callable(make) else None)

        def _answer(self, answer: Any) -> None:
            if answer is None or callable(answer):
                self.send_error(404)
                return
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def vllm(live: str = "tcp://*:5557", replay: str | None = "tcp://*:5558", **changes: Any) -> dict[str, Any]:
    """Return the answers of a vLLM 0.33 server with one rank."""
    source = {
        "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": live, "replay_endpoint": replay,
        "buffer_steps": 10_000, "hwm": 100_000, "max_queue_size": 100_000, "topic": "kv@pod-a@m",
    }  # fmt: skip
    return {
        "/kv_event_sources": {"0": source},
        "/v1/models": {"data": [{"id": "m", "max_model_len": 4096}, {"id": "alias"}]},
        "/version": {"version": "0.33.0"},
        "/metrics": (
            'vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",'
            'hash_block_size="None"} 1.0\nvllm:num_requests_running{engine="0"} 1.0\n'
        ),
    } | changes
