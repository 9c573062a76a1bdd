"""Pages of the console over HTTP: the page's files, its data as JSON, and what every answer says."""

from __future__ import annotations

import hmac
import logging
from importlib import resources
from typing import Final

from aiohttp import web

from kvatlas.bridge.errors import KvatlasError, LogError, SettingsError
from kvatlas.deploy.console.api import Api, Handler
from kvatlas.deploy.console.options import is_loopback
from kvatlas.deploy.console.readers import NotForReaderError
from kvatlas.scorer.api import http_runner
from kvatlas.scorer.api.status import HTTP_STATUS, http_status, retry_headers
from kvatlas.scorer.errors import ClientError

_TYPES: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_STOP_SECONDS: Final = 2.0

#: What aiohttp tells of broken requests: one line each, without a traceback.
_SERVER_LOG: Final = logging.getLogger("kvatlas.console.http")

log = logging.getLogger(__name__)


class Pages:
    """Answers for whoever opens the page.

    Args:
        api: answers the page's questions.
        token: opens the page; empty for names of this machine alone.
    """

    def __init__(self, api: Api, token: str) -> None:
        self._api = api
        self._token = token

    async def runner(self) -> web.AppRunner:
        """Return what serves them, without an address yet."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._static)
        app.router.add_get("/{name:[a-z]+\\.(?:js|css|svg)}", self._static)
        for method, path, handler in self._api.routes():
            app.router.add_route(method, path, handler)
        return await http_runner.started(app, _SERVER_LOG, _STOP_SECONDS)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for the token, put the headers of safety on every answer, and make errors JSON."""
        try:
            if not self._token and not is_loopback(request.host):  # a page elsewhere whose name leads here
                return _error(403, "without a token the page answers to names of this machine alone")
            if request.path.startswith("/api/"):
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self._token and not hmac.compare_digest(
                    given.encode(errors="surrogateescape"), self._token.encode()
                ):
                    return _error(401, "the token is missing or wrong")
            answer = await handler(request)
        except web.HTTPException as error:
            answer = _error(error.status, error.reason or "refused")
        except (SettingsError, ValueError, OverflowError) as error:
            answer = _error(400, str(error))
        except NotForReaderError as error:
            answer = _error(403, str(error))
        except ClientError as error:
            answer = _error(HTTP_STATUS.get(error.code, 502), f"the scorer: {error}")
        except LogError as error:
            answer = _error(503, str(error))
        except KvatlasError as error:
            answer = _error(http_status(error), str(error), retry_headers(error))
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            answer = _error(500, "this failed in a way that nobody foresaw; the log has it")
        answer.headers.update(_HEADERS)
        return answer

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        file = resources.files("kvatlas.deploy.console").joinpath("static", name)
        if not file.is_file():
            raise web.HTTPNotFound
        return web.Response(body=file.read_bytes(), content_type=_TYPES[name.rpartition(".")[2]], charset="utf-8")


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": text}, status=status, headers={**_HEADERS, **(headers or {})})
