"""Simulated engines that serve: the OpenAI API over the pods of a fleet, with streams, usage and metrics.

A pod computes prompts one after the other at a rate, decodes up to ``max_running`` requests at a time, and tells in its
usage how many prompt tokens it had cached when the prompt's turn came, as vLLM does with
``--enable-prompt-tokens-details``. What it generates are random tokens; the text is a word for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.sim.cache import Request, Running
from kvatlas.deploy.sim.errors import PoolFullError, SimError
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.pod import SimPod
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool

#: Response header with the name of the pod that answered.
POD_HEADER: Final = "x-sim-pod"
#: What a simulated engine says it is: the version whose wire format and usage it has.
_VERSION: Final = "0.33.0"
_MOST_BYTES: Final = 64 * 1024 * 1024
_DEFAULT_OUTPUT: Final = 16
_WAIT_SECONDS: Final = 0.005


class ServedPod:
    """One pod behind HTTP.

    Args:
        pod: the simulated pod.
        settings: rates and limits.
        pool: tokenizers; the pod tokenizes as a real engine does.

    Attributes:
        address: ``host:port`` that it serves on, once started.
    """

    def __init__(self, pod: SimPod, settings: SimPlan, pool: TokenizerPool) -> None:
        self.address = ""
        self._pod = pod
        self._settings = settings
        self._pool = pool
        self._turn = asyncio.Lock()  # prompts are computed one after the other
        self._places = asyncio.Semaphore(settings.max_running)
        self._waiting = 0
        self._running = 0
        self._used_blocks = 0
        self._asked_tokens = self._found_tokens = 0
        self._random = random.Random(settings.seed)  # noqa: S311 - traffic, not secrets
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            SimError: the address cannot be bound.
        """
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/kv_event_sources", self._event_sources)
        app.router.add_post("/tokenize", self._tokenize)
        for shape in requests.SHAPES:
            path = "/inference/v1/generate" if shape == "generate" else f"/v1/{shape}"
            app.router.add_post(path, self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise SimError(f"a simulated engine cannot listen on {host}:{port}: {error}") from error
        bound = self._runner.addresses[0]
        self.address = f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        """Stop listening, and cut what is being answered."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self._settings.model, "object": "model"}]})

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": _VERSION})

    async def _event_sources(self, _request: web.Request) -> web.Response:
        status = self._pod.status()
        told = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": status.endpoint,
            "replay_endpoint": status.replay_endpoint,
            "topic": f"kv@{self._pod.name}@{self._settings.model}",
        }
        return web.json_response({"0": told})

    async def _tokenize(self, http: web.Request) -> web.Response:
        try:
            body = json.loads(await http.read())
            asked = requests.read("chat/completions" if "messages" in body else "completions", body)[0]
            encoded = await self._pool.tokens_of(asked.model, asked)
        except (ValueError, KvatlasError) as error:
            return web.json_response({"error": {"message": str(error), "code": 400}}, status=400)
        tokens = list(memoryview(encoded.ids).cast("I"))
        return web.json_response({"tokens": tokens, "count": len(tokens)})

    async def _metrics(self, _request: web.Request) -> web.Response:
        labels = f'{{engine="0",model_name="{self._settings.model}"}}'
        figures = {
            "vllm:num_requests_running": self._running,
            "vllm:num_requests_waiting": self._waiting,
            "vllm:kv_cache_usage_perc": min(1.0, self._used_blocks / self._settings.blocks),
        }
        counts = {
            "vllm:prefix_cache_queries_total": self._asked_tokens,
            "vllm:prefix_cache_hits_total": self._found_tokens,
        }
        lines = [f"{name}{labels} {float(value)}\n" for name, value in counts.items()]
        lines += [f"# TYPE {name} gauge\n{name}{labels} {float(value)}\n" for name, value in figures.items()]
        size = self._settings.block_size_tokens
        lines.append(
            f'vllm:cache_config_info{{block_size="{size}",enable_prefix_caching="True",engine="0",'
            'hash_block_size="None"} 1.0\n'
        )
        return web.Response(text="".join(lines))

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        shape = requests.shape_of(http.path)
        assert shape is not None
        try:
            body = json.loads(await http.read())
            asked = requests.read(shape, body)[0]
            encoded = await self._pool.tokens_of(asked.model, asked)
        except (ValueError, KvatlasError) as error:
            return web.json_response({"error": {"message": str(error), "code": 400}}, status=400)
        if asked.model != self._settings.model:
            return web.json_response({"error": {"message": f"no model {asked.model!r} here", "code": 404}}, status=404)
        count = _output_tokens(body, self._settings.trace_output_tokens)
        request = Request(
            tokens=list(memoryview(encoded.ids).cast("I")),
            output=[self._random.randrange(self._settings.vocabulary) for _ in range(count)],
            cache_salt=asked.cache_salt or None,
            lora=asked.lora or None,
        )
        self._waiting += 1
        counted = True
        try:
            async with self._places:
                async with self._turn:
                    self._waiting -= 1
                    counted = False
                    running = await self._prefill(request)
                if running is None:
                    return web.json_response({"error": {"message": "the prompt does not fit", "code": 400}}, status=400)
                return await self._decode(http, shape, body, running)
        finally:
            if counted:
                self._waiting -= 1

    async def _prefill(self, request: Request) -> Running | None:
        """Compute a prompt; None when it never fits."""
        self._running += 1
        try:
            hit = self._pod.hit_tokens(request)
            await asyncio.sleep((len(request.tokens) - hit) / self._settings.tokens_per_second)
            while True:
                try:
                    running = self._pod.begin(request)
                    self._asked_tokens += len(request.tokens)
                    self._found_tokens += running.hit_blocks * self._settings.block_size_tokens
                    return running
                except PoolFullError:
                    if self._running == 1:
                        return None
                    await asyncio.sleep(_WAIT_SECONDS)
        finally:
            self._running -= 1

    async def _decode(
        self, http: web.Request, shape: requests.Shape, body: Mapping[str, Any], running: Running
    ) -> web.StreamResponse:
        self._running += 1
        held = len(running.slots)
        self._used_blocks += held
        try:
            if body.get("stream"):
                return await self._stream(http, shape, body, running)
            for number in range(len(running.request.output)):
                await self._step(running, number)
            whole = _whole(shape, self._settings.model, running, self._settings.block_size_tokens)
            return web.json_response(whole, headers={POD_HEADER: self._pod.name})
        finally:
            self._running -= 1
            self._used_blocks -= held
            self._pod.end(running)

    async def _step(self, running: Running, number: int) -> None:
        """Generate one token; the last one is never fed back, so its KV is never computed."""
        if self._settings.step_ms:
            await asyncio.sleep(self._settings.step_ms / 1e3)
        output = running.request.output
        if number + 1 == len(output):
            return
        with contextlib.suppress(PoolFullError):  # cut short, as an engine that preempts would be late
            self._pod.grow(running, [output[number]])

    async def _stream(
        self, http: web.Request, shape: requests.Shape, body: Mapping[str, Any], running: Running
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", POD_HEADER: self._pod.name})
        await response.prepare(http)
        names = itertools.repeat(f"sim-{uuid.uuid4().hex[:12]}")
        for number in range(len(running.request.output)):
            await self._step(running, number)
            event = _event(shape, self._settings.model, next(names), number)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        options = body.get("stream_options") or {}
        if options.get("include_usage") or self._settings.always_usage:
            last = {"choices": [], "usage": _usage(running, self._settings.block_size_tokens)}
            await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _output_tokens(body: Mapping[str, Any], most: int) -> int:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return min(value, most)
    return min(_DEFAULT_OUTPUT, most)


def _usage(running: Running, block_size_tokens: int) -> dict[str, Any]:
    prompt, output = len(running.request.tokens), len(running.request.output)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": running.hit_blocks * block_size_tokens},
    }


def _whole(shape: requests.Shape, model: str, running: Running, block_size_tokens: int) -> dict[str, Any]:
    text = " ".join(f"w{token % 100}" for token in running.request.output)
    usage = _usage(running, block_size_tokens)
    common = {"id": f"sim-{uuid.uuid4().hex[:12]}", "model": model, "created": int(time.time())}
    if shape == "responses":
        details = {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]}
        usage = {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "input_tokens_details": details,
        }
        return {**common, "object": "response", "output_text": text, "usage": usage}
    if shape == "messages":
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        usage = {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
        return {**common, "type": "message", "content": [{"type": "text", "text": text}], "usage": usage}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    if shape == "chat/completions":
        choice["message"] = {"role": "assistant", "content": text}
        kind = "chat.completion"
    else:
        choice["text"] = text
        kind = "text_completion"
    return {**common, "object": kind, "choices": [choice], "usage": usage}


def _event(shape: requests.Shape, model: str, name: str, number: int) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    if shape == "chat/completions":
        choice["delta"] = {"content": f"w{number} "}
    else:
        choice["text"] = f"w{number} "
    return {"id": name, "model": model, "choices": [choice]}


class ServedFleet:
    """The pods of a fleet behind HTTP, on a thread of their own.

    Args:
        fleet: the pods.
        tokenizer: where tokenizers come from.
    """

    def __init__(self, fleet: Fleet, tokenizer: TokenizerSettings) -> None:
        self._fleet = fleet
        self._tokenizer = tokenizer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sim-serving", daemon=True)
        self._served: dict[str, ServedPod] = {}
        self._gone: dict[str, str] = {}  # where pods were that went away
        self._pool: TokenizerPool | None = None

    @property
    def addresses(self) -> dict[str, str]:
        """Serving address of each pod."""
        return {name: served.address for name, served in self._served.items()}

    def endpoints(self) -> list[str]:
        """Return the serving addresses as ``kvatlas picker --endpoints`` takes them."""
        model = self._fleet.settings.model
        return [f"{address},pod={name},model={model}" for name, address in self.addresses.items()]

    def start(self) -> None:
        """Listen on every pod's address.

        Raises:
            SimError: an address cannot be bound.
        """
        self._thread.start()
        self._do(self._start())

    async def _start(self) -> None:
        settings = self._fleet.settings
        self._pool = TokenizerPool(self._tokenizer)
        for number, name in enumerate(self._fleet.pods):
            await self._start_pod(name, settings.host, settings.serve_port + number if settings.serve_port else 0)

    async def _start_pod(self, name: str, host: str, port: int) -> None:
        assert self._pool is not None
        served = ServedPod(self._fleet.pods[name], self._fleet.settings, self._pool)
        await served.start(host, port)
        self._served[name] = served

    def stop_pod(self, name: str) -> None:
        """Let a pod go away, with what it is answering."""
        self._gone[name] = self._served[name].address
        self._do(self._served.pop(name).stop())

    def restart_pod(self, name: str) -> None:
        """Let a pod that went away come back where it was, as a new process would: with nothing cached."""
        self._fleet.pods[name].restart()
        host, _, port = self._gone.pop(name).rpartition(":")
        self._do(self._start_pod(name, host, int(port)))

    def close(self) -> None:
        """Stop everything."""
        if self._thread.is_alive():
            self._do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    async def _close(self) -> None:
        for served in self._served.values():
            await served.stop()
        if self._pool is not None:
            self._pool.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)
