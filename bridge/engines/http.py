"""HTTP client of engines: asks one what it is and where it publishes, see :mod:`kvatlas.bridge.engines.facts`.

An answer is read to a bound and within a deadline, in a thread of its own: an engine that hangs or says too much holds
up nobody.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit

from kvatlas.bridge.engines.facts import EngineFacts, sglang_facts, vllm_facts
from kvatlas.bridge.engines.spec import HTTP_OPTIONS, EngineSpec, computes_again, engine_specs, offset, split_spec
from kvatlas.bridge.errors import SettingsError, UnresolvedError

TIMEOUT_SECONDS: Final = 3.0
#: SGLang's, and vLLM's in its development mode, of another shape.
_SERVER_INFO: Final = "/server_info?config_format=json"
_ANSWER_BYTES: Final = 8 * 1024 * 1024
#: Of their own: engines that hang, of which there may be many, keep no thread from anything else.
_THREADS: Final = ThreadPoolExecutor(64, "engine-http")
_SCHEMES: Final = ("http", "https")
#: Engines are neighbours: no proxy of the environment stands between.
OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_http(text: str) -> bool:
    """Tell whether an engine spec is an HTTP address to ask, rather than addresses of sockets."""
    return text.partition("://")[0].strip() in _SCHEMES


def parse_http(text: str) -> tuple[str, dict[str, str]]:
    """Read ``http://HOST:PORT[,pod=NAME][,model=NAME]...``; returns the address without a path, and the options.

    Raises:
        SettingsError: the text is no such spec.
    """
    addresses, options = split_spec(text, HTTP_OPTIONS)
    parts = urlsplit(addresses[0]) if len(addresses) == 1 else None
    try:
        valid = parts is not None and parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts is None or parts.username is not None:
        raise SettingsError(f"engine {text!r}: expected one address http://HOST:PORT of the engine's API")
    return f"{parts.scheme}://{parts.netloc}", options


async def specs_over_http(text: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[EngineSpec]:
    """Ask the engine at an HTTP spec where it publishes; one endpoint per rank.

    Raises:
        SettingsError: the spec is not valid.
        UnresolvedError: the engine does not answer, or tells no event sockets; says what to do.
    """
    url, options = parse_http(text)
    facts = await ask_engine(url, timeout_seconds, figures=False)
    if not facts.sources:
        why = (
            f"publishes no events: start it with {_EVENTS_ON[facts.engine]}"
            if facts.knows_sources
            else "does not say where it publishes (vLLM before 0.31): give its sockets, tcp://HOST:PORT,tcp://HOST:REPLAY"
        )
        raise UnresolvedError(f"engine {url} ({facts.engine} {facts.version or 'of unknown version'}) {why}")
    try:
        return specs_of(facts, options)
    except SettingsError as error:  # what an engine says is no setting: it alone is left out
        raise UnresolvedError(str(error)) from error


_EVENTS_ON: Final = {
    "vllm": '--kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", ...}\'',
    "sglang": '--kv-events-config \'{"publisher": "zmq", "endpoint": "tcp://*:5557", ...}\'',
}


def specs_of(facts: EngineFacts, options: dict[str, str]) -> list[EngineSpec]:
    """Return the endpoints of an engine from what it told.

    A topic ``kv@POD@MODEL`` goes before these names; without one the pod is the engine's HTTP address.
    """
    pod = options.get("pod") or facts.url.partition("://")[2]
    model = options.get("model") or (facts.models[0] if facts.models else "")
    told = {"speculation": facts.speculation} if computes_again(facts.engine, facts.speculation) else {}
    kept = told | {name: value for name, value in options.items() if name not in ("pod", "model")}
    found = []
    for source in facts.sources:
        (spec,) = engine_specs(
            facts.url, source.live, source.replay, {**kept, "pod": pod, "model": model, "engine": facts.engine}
        )
        # A load socket says more, and sooner, than the page does, and does not depend on --enable-metrics.
        load = offset(facts.load, source.rank) if facts.load else ""
        metrics = "" if load else f"{facts.url}/metrics"
        found.append(spec.replace(rank=source.rank, ranks=len(facts.sources), metrics=metrics, load=load))
    return found


async def ask_engine(url: str, timeout_seconds: float = TIMEOUT_SECONDS, *, figures: bool = True) -> EngineFacts:
    """Ask an engine what it is; several requests at once.

    Args:
        url: its API, without a path.
        timeout_seconds: of each request.
        figures: read the page of metrics too, which alone tells vLLM's block size and whether it reuses prefixes;
            it is long, and who asks again and again for sockets needs none of it.

    Raises:
        UnresolvedError: nothing there answers as vLLM or SGLang do.
    """
    paths = [_SERVER_INFO, "/get_server_info", "/v1/models", "/version", "/kv_event_sources"]
    if figures:
        paths.append("/metrics")
    async with asyncio.TaskGroup() as group:
        tasks = {path: group.create_task(get_page(url + path, timeout_seconds)) for path in paths}
    answers = {path: task.result() for path, task in tasks.items()}
    metrics = answers.pop("/metrics", None)
    page = metrics.decode(errors="replace") if isinstance(metrics, bytes) else ""
    errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
    models = _json(answers["/v1/models"])
    for path in (_SERVER_INFO, "/get_server_info"):
        info = _json(answers[path])
        if isinstance(info, dict) and ("page_size" in info or "kv_events" in info):
            return sglang_facts(url, info=info, models=models, metrics=page)
    if len(errors) == len(answers) or models is None:
        reason = errors[0] if errors else "/v1/models is no model list"
        raise UnresolvedError(f"engine {url}: {reason}; give the address of its OpenAI API, http://HOST:PORT")
    told = answers[_SERVER_INFO]
    if isinstance(told, Exception) and not figures:  # what it said before must not come and go
        raise UnresolvedError(f"engine {url}: /server_info: {told}")
    return vllm_facts(
        url,
        sources=_json(answers["/kv_event_sources"]),
        models=models,
        version=_json(answers["/version"]),
        info=_json(told),
        metrics=page,
    )


async def get_page(url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> bytes | Exception | None:
    """Return the body of an answer; None for one that says the path is not there, the error for no answer at all."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, _get, url, timeout_seconds)


def _get(url: str, timeout_seconds: float) -> bytes | Exception | None:
    try:
        with OPENER.open(url, timeout=timeout_seconds) as answer:
            body: bytes = answer.read(_ANSWER_BYTES)
            return body
    except urllib.error.HTTPError as error:
        with error:
            return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return error


def _json(answer: bytes | Exception | None) -> Any:
    if not isinstance(answer, bytes):
        return None
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
