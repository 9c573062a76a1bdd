"""HTTP endpoint of the fleet: what is true, and handles for tests that disturb it.

::

    GET  /pods                  figures and last sequence of every pod
    GET  /truth                 block keys that every pod holds, by tier
    POST /expect                {"tokens": [...], "model": ..., "cache_salt": ..., "lora": ...} or a list of such
    POST /clear?pod=NAME        drop a pod's cache and announce it
    POST /restart?pod=NAME      a new process in its place
    POST /pause, /resume        the traffic; after /pause returned, no event follows
    POST /serve?requests=N      run N requests at once; answers with them
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.bridge.model.numbers import port_of
from kvatlas.deploy.sim.errors import SimError, UnknownPodError
from kvatlas.deploy.sim.fleet import Fleet

_MAX_BODY_BYTES: Final = 256 * 1024 * 1024


class Question(msgspec.Struct, frozen=True):
    """A prompt whose scores are asked for."""

    tokens: list[int]
    model: str | None = None
    cache_salt: str | None = None
    lora: str | None = None


_questions: Final = msgspec.json.Decoder(Question | list[Question])


class TruthServer:
    """Serves a fleet's truth on its own threads.

    Args:
        fleet: what to tell of.
        listen: ``HOST:PORT``; port 0 takes a free one.
    """

    def __init__(self, fleet: Fleet, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        if not host or (number := port_of(port)) is None:
            raise SettingsError(f"[sim] truth_listen {listen!r} is not HOST:PORT")
        self._fleet = fleet
        self._where = (host, number)
        self._server: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` that is bound."""
        assert self._server is not None
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def start(self) -> None:
        """Bind and serve.

        Raises:
            SimError: the address cannot be bound.
        """
        try:
            self._server = ThreadingHTTPServer(self._where, _handler(self._fleet))
        except OSError as error:
            raise SimError(f"cannot serve the truth on {self._where[0]}:{self._where[1]}: {error}") from error
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="sim-truth", daemon=True
        ).start()

    def stop(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _handler(fleet: Fleet) -> type[BaseHTTPRequestHandler]:
    def expect(_: dict[str, str], body: bytes) -> Any:
        questions = _questions.decode(body)
        many = questions if isinstance(questions, list) else [questions]
        answers = [fleet.expect(one.tokens, model=one.model, cache_salt=one.cache_salt, lora=one.lora) for one in many]
        return answers if isinstance(questions, list) else answers[0]

    def act(action: Callable[[], object]) -> Any:
        action()
        return fleet.status()

    routes: dict[tuple[str, str], Callable[[dict[str, str], bytes], Any]] = {
        ("GET", "/pods"): lambda _query, _body: fleet.status(),
        ("GET", "/truth"): lambda _query, _body: fleet.truth(),
        ("POST", "/expect"): expect,
        ("POST", "/clear"): lambda query, _body: act(fleet.pod(query["pod"]).clear),
        ("POST", "/restart"): lambda query, _body: act(fleet.pod(query["pod"]).restart),
        ("POST", "/pause"): lambda _query, _body: act(fleet.pause),
        ("POST", "/resume"): lambda _query, _body: act(fleet.resume),
        ("POST", "/serve"): lambda query, _body: fleet.serve(int(query["requests"])),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing: tests ask often."""

        def _answer(self, method: str) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(min(length, _MAX_BODY_BYTES))
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            route = routes.get((method, parts.path))
            if route is None:
                self._send(404, {"error": f"no {method} {parts.path}"})
                return
            try:
                self._send(200, route(query, body))
            except UnknownPodError as error:
                self._send(404, {"error": str(error)})
            except KeyError as error:
                self._send(400, {"error": f"{parts.path} needs ?{error.args[0]}="})
            except (msgspec.MsgspecError, ValueError, KvatlasError) as error:
                self._send(400, {"error": str(error)})

        def _send(self, status: int, answer: Any) -> None:
            body = msgspec.json.encode(answer)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
