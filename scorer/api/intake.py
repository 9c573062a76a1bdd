"""From what a caller sends to what the core works on: bounds, bodies of engines' APIs, served names, token ids.

Steps of a request, the same at every front::

    bytes or JSON -> message         message(): big ones are read in a process of their own
    message -> opened requests       open_request(): names bounded, request_json read, model and adapter resolved
    opened -> request with tokens    ready(): request_json tokenized; the core tokenizes our own forms
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.api.bounds import MAX_BATCH, check_name, check_request
from kvatlas.scorer.api.names import ServedModels, ServedNames
from kvatlas.scorer.api.varints import is_quick, score_request
from kvatlas.scorer.errors import DeadlineError, InputError, TooLargeError, UnknownModelError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization import aside, aside_jobs, requests
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import Place
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: Bodies up to this size are read at once: less than a few milliseconds of the event loop.
_AT_ONCE_BYTES: Final = 64 * 1024
_READERS: Final = 2
_READ_SECONDS: Final = 20.0
_READ_CPU_SECONDS: Final = 6.0
#: Memory of a process that reads: Python's values of a JSON document are many times as large as its text.
_MEMORY_PER_BYTE: Final = 64
_OWN_FORMS: Final = ("tokens", "tokens_packed", "prompt")


class Opened(NamedTuple):
    """A request whose names are those of block keys; ``prompt`` is what request_json had, None for our own forms."""

    request: pb.ScoreRequest
    prompt: requests.EngineRequest | None


class Ready(NamedTuple):
    """A request for the core, the tokenizer backend that made its tokens here (or empty), and seconds it took."""

    request: pb.ScoreRequest
    tokenizer: str = ""
    seconds: float = 0.0


class Intake:
    """Reads requests. Its processes start with the first big one."""

    def __init__(
        self, settings: ScorerSettings, pool: TokenizerPool | None, served: Callable[[], ServedModels]
    ) -> None:
        """Take the tokenizers (None: token ids only) and what tells which names pods serve.

        Raises:
            SettingsError: an alias or adapter makes no sense.
        """
        self.names = ServedNames(settings.aliases, settings.adapters, served)
        self._settings = settings
        self._pool = pool
        self._threads = ThreadPoolExecutor(_READERS, "intake")
        self._aside = aside.Aside(
            processes=_READERS,
            cpu_seconds=_READ_CPU_SECONDS,
            memory_bytes=(256 << 20) + _MEMORY_PER_BYTE * settings.max_message_bytes,
            answer_bytes=4 * settings.max_message_bytes + (1 << 20),
            what="reading the body",
        )

    def close(self) -> None:
        """End the processes."""
        self._aside.close()
        self._threads.shutdown(wait=False)

    # --- bytes to values -----------------------------------------------------------------------------------------

    async def message(self, name: str, data: bytes, form: str) -> Any:
        """Return one of our own messages.

        Args:
            name: of the message, such as ``ScoreRequest``.
            data: its JSON (``form`` json) or binary form.
            form: ``json`` or ``binary``.

        Raises:
            InputError: the bytes are no such message.
        """
        if len(data) <= _AT_ONCE_BYTES or (form == "binary" and name == "ScoreRequest" and is_quick(data)):
            return self._parsed(name, data, form)
        binary = await self._beside(aside.READ_MESSAGE, f"{name} {form}\n".encode() + data)
        return self._parsed(name, binary, "binary")

    def _parsed(self, name: str, data: bytes, form: str) -> Any:
        if name == "ScoreRequest" and form == "binary":
            return aside_jobs.translated(score_request, data)
        message = getattr(pb, name)()
        aside_jobs.parse_message(data, message, form)
        return message

    async def prompts(self, path: str, body: bytes) -> list[requests.EngineRequest]:
        """Return the prompts of a body of an engine's API.

        Args:
            path: of the request, such as ``/v1/messages``; empty is told by the body.
            body: its JSON.

        Raises:
            InputError: the path or the body is none of an engine's.
        """
        shape = requests.shape_of(path) if path else ""
        if shape is None:
            raise InputError(f"request_path: {path[:80]!r} ends in none of {', '.join(requests.SHAPES)}")
        if len(body) <= _AT_ONCE_BYTES:
            return aside_jobs.read_json(shape, body)
        answer = await self._beside(aside.READ_BODY, shape.encode() + b"\n" + body)
        found: list[requests.EngineRequest] = pickle.loads(answer)  # noqa: S301 - written by our own code
        return found

    async def _beside(self, job: int, payload: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: self._aside.run(job, payload, timeout_seconds=_READ_SECONDS)
        )

    # --- values to requests --------------------------------------------------------------------------------------

    async def open_request(self, request: pb.ScoreRequest) -> list[Opened]:
        """Return a request with the names of block keys; several where request_json has several prompts.

        Raises:
            InputError: a name is too long, the body is none, or the names contradict each other.
        """
        check_request(request)
        if not request.request_json:
            return [Opened(self._named(request), None)]
        if request.HasField("chat") or any(getattr(request, form) for form in _OWN_FORMS):
            raise InputError("request_json: is a form of input of its own; give no tokens, prompt or chat beside it")
        return self.open_prompts(await self.prompts(request.request_path, request.request_json.encode()), request)

    def open_prompts(
        self, prompts: list[requests.EngineRequest], beside: pb.ScoreRequest | None = None
    ) -> list[Opened]:
        """Return the requests of a body's prompts, with what was given beside it.

        Raises:
            InputError: a name is too long, or given twice in different ways.
        """
        if len(prompts) > MAX_BATCH:
            raise TooLargeError(f"prompt: more than {MAX_BATCH} prompts")
        return [Opened(self._named(self._joined(prompt, beside)), prompt) for prompt in prompts]

    def named_model(self, model: str) -> str:
        """Return a model's name as its engines have it.

        Raises:
            InputError: it is too long, or an adapter of several models.
        """
        check_name(model, "model")
        return self.names.resolve(model, "")[0]

    def _named(self, request: pb.ScoreRequest) -> pb.ScoreRequest:
        model, lora = self.names.resolve(request.model, request.lora)
        if (model, lora) != (request.model, request.lora):
            request.model, request.lora = model, lora
        return request

    def _joined(self, prompt: requests.EngineRequest, beside: pb.ScoreRequest | None) -> pb.ScoreRequest:
        found = pb.ScoreRequest(
            model=prompt.model,
            lora=prompt.lora,
            cache_salt=prompt.cache_salt,
            request_id=prompt.request_id,
            strategy=prompt.strategy,
            pods=prompt.pods,
            usable_only=prompt.usable_only,
            multimodal=[_item(place) for place in prompt.multimodal],
        )
        if beside is not None:
            for field in ("model", "lora", "cache_salt", "request_id", "strategy"):
                given, inside = getattr(beside, field), getattr(found, field)
                if given and inside and given != inside:
                    raise InputError(f"{field}: request_json has {inside[:80]!r}, beside it stands {given[:80]!r}")
                setattr(found, field, given or inside)
            found.usable_only |= beside.usable_only
            found.pods.extend(beside.pods)
            if beside.multimodal:
                raise InputError("multimodal: give the items inside request_json")
        check_request(found)
        return found

    async def ready(self, opened: Opened, deadline: float) -> Ready:
        """Return a request for the core: what request_json had is tokenized; ``deadline`` in monotonic seconds.

        Raises:
            DeadlineError: it was not tokenized in time.
            InputError: the prompt cannot be rendered or tokenized.
            UnknownModelError: there is no tokenizer for the model.
        """
        request, prompt = opened
        if prompt is None:
            return Ready(request)
        if prompt.truncation is not None and prompt.multimodal:
            raise InputError(
                "truncate_prompt_tokens: not together with multimodal, whose places are of the whole prompt"
            )
        began = time.perf_counter()
        if prompt.tokens is None and self._pool is None:
            raise UnknownModelError(f"no tokenizer for {request.model!r} here: this scorer takes token ids only")
        if not request.model:
            raise InputError("model: missing; block keys differ by model")
        assert self._pool is not None or prompt.tokens is not None
        if self._pool is None:
            request.tokens_packed = prompt.tokens or b""
            return Ready(request)
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as waiting:
                encoded = await self._pool.tokens_of(request.model, prompt)
        except TimeoutError as error:
            if not waiting.expired():
                raise
            raise DeadlineError(
                f"the prompt was not tokenized in time; is the tokenizer of {request.model!r} loading?"
            ) from error
        request.tokens_packed = encoded.ids
        return Ready(request, encoded.backend, time.perf_counter() - began)

    async def text_of(self, model: str, ids: bytes) -> str:
        """Return the text of token ids, empty where no tokenizer here can tell."""
        if self._pool is None:
            return ""
        try:
            return await self._pool.text_of(model, ids)
        except KvatlasError:
            return ""


def _item(place: Place) -> pb.MultimodalItem:
    return pb.MultimodalItem(identifier=place.identifier, offset=place.offset, length=place.length)
