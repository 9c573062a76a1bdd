"""The tokenizer pool: what the scorer asks for token ids."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.errors import BusyError, TooLargeError, UnknownModelError
from kvatlas.scorer.tokenization.arguments import EngineArguments, engine_arguments
from kvatlas.scorer.tokenization.aside import RENDER, Aside
from kvatlas.scorer.tokenization.backend import LoadedTokenizer, LocalBackend, Making, TokenizerBackend
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.errors import (
    BadModelError,
    NoTokenizerError,
    PromptLimitError,
    TemplateLimitError,
    TokenizeInputError,
    TokenizerBackendError,
)
from kvatlas.scorer.tokenization.harmony import HarmonyRenderer
from kvatlas.scorer.tokenization.hub import HubBackend
from kvatlas.scorer.tokenization.limits import TOKENIZER_LIMITS, TokenizerLimits
from kvatlas.scorer.tokenization.loaded import Loaded
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.records import ChatInput, Encoded, Rendered, Truncation, cut
from kvatlas.scorer.tokenization.remote import RemoteBackend
from kvatlas.scorer.tokenization.requests import EngineRequest
from kvatlas.scorer.tokenization.text_cache import TextCache

#: Loads and calls that wait for a network; they cost no processor time here.
_WAITING_THREADS: Final = 32
_LOADING_THREADS: Final = 4
#: Requests with templates of their own that wait for a process; more are refused.
_WAITING_TEMPLATES: Final = 8

T = TypeVar("T")


class TokenizerPool:
    """Tokenizers of any number of models, from the backends of the settings in their order.

    A model is loaded on first use, once. When a backend does not know a model, cannot be reached or has broken files,
    the next one is asked; what is wrong with a request itself goes straight back to the caller. All methods may be
    called from several event loops and threads.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        *,
        backends: Sequence[TokenizerBackend] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
        limits: TokenizerLimits = TOKENIZER_LIMITS,
        also_named: Callable[[str], Sequence[str]] = lambda _model: (),
    ) -> None:
        """Start the threads; tokenizers are loaded when they are asked for.

        Args:
            settings: where tokenizers come from.
            backends: instead of those of the settings.
            clock: monotonic seconds.
            now: the wall clock, for templates that print a date.
            limits: bounds on prompts, templates and what stays loaded.
            also_named: other names of a model, under which its tokenizer may be known.
        """
        self._also_named = also_named
        self._settings, self._limits = settings, limits
        self.cache = TextCache(settings.prefix_cache_bytes)
        self._aside = Aside(
            processes=limits.template_processes,
            cpu_seconds=limits.template_seconds,
            memory_bytes=limits.template_memory_bytes,
            answer_bytes=limits.prompt_bytes,
            what="rendering the request's chat template ",
        )
        making = Making(
            self.cache,
            ChatRenderer(settings, now, self._render_beside, limits=limits),
            HarmonyRenderer(settings.harmony_date, now),
            settings.transformers,
            _by_all_names(engine_arguments(settings.engine_args), also_named),
        )
        self._backends = tuple(backends if backends is not None else backends_of(settings, making, limits))
        self._loading = ThreadPoolExecutor(_LOADING_THREADS, "tokenizer-load")
        self._waiting = ThreadPoolExecutor(_WAITING_THREADS, "tokenizer-wait")
        self._working = ThreadPoolExecutor(os.cpu_count() or 1, "tokenizer")
        # Whoever renders a template of a request waits for another process, and must not keep others from tokenizing.
        self._foreign = ThreadPoolExecutor(limits.template_processes + _WAITING_TEMPLATES, "tokenizer-foreign")
        self._waiting_templates = 0
        self._loaded = Loaded(self._loading, max_models=limits.models, max_bytes=limits.model_bytes, clock=clock)

    async def encode(
        self,
        model: str,
        prompt: str,
        add_special_tokens: bool = True,
        truncate: Truncation | None = None,
        offsets: bool = False,
    ) -> Encoded:
        """Tokenize a prompt as the engine does for a completion.

        Args:
            model: name of the model.
            prompt: the text.
            add_special_tokens: add the tokens the tokenizer itself puts around a text, as engines do for completions.
            truncate: how to cut a prompt with too many tokens; None keeps all of it.
            offsets: also return each token's place in the text; never from the prefix cache, so slower.

        Raises:
            UnknownModelError: no backend knows the model.
            PromptLimitError: the prompt is longer than the limit.
            TokenizeInputError: the text is not valid Unicode, or the truncation makes no sense.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        self._check_prompt(prompt)

        def work(engine: LoadedTokenizer) -> Encoded:
            return engine.encode(prompt, add_special_tokens=add_special_tokens, truncation=truncate, offsets=offsets)

        def known(engine: LoadedTokenizer) -> Encoded | None:
            return engine.known(prompt, add_special_tokens=add_special_tokens, truncation=truncate)

        at_once = known if not offsets else None
        encoded, backend = await self._ask(model, work, at_once=at_once)
        return Encoded(encoded.ids, backend, encoded.offsets, encoded.known_chars)

    async def render_chat(self, model: str, chat: ChatInput) -> Rendered:
        """Render a chat as text, as the engine does.

        Raises:
            UnknownModelError: no backend knows the model.
            InputError: the messages, the template or the limits refuse it.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        with self._template_place(chat) as executor:
            return Rendered(*await self._ask(model, lambda engine: engine.render(chat), executor))

    async def encode_chat(self, model: str, chat: ChatInput, truncate: Truncation | None = None) -> Encoded:
        """Render a chat and tokenize it, as the engine does: the template, not the tokenizer, adds special tokens.

        Raises:
            UnknownModelError: no backend knows the model.
            InputError: the messages, the template or the limits refuse it.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        with self._template_place(chat) as executor:
            encoded, backend = await self._ask(model, lambda engine: engine.encode_chat(chat, truncate), executor)
        return Encoded(encoded.ids, backend, encoded.offsets, encoded.known_chars)

    async def tokens_of(self, model: str, request: EngineRequest) -> Encoded:
        """Return the token ids that the engine makes of a request's prompt; ``backend`` is empty for given ids.

        Args:
            model: whose tokenizer; the request's own name may be an alias or an adapter.
            request: what :func:`~kvatlas.scorer.tokenization.requests.read` made of a body.

        Raises:
            UnknownModelError: no backend knows the model.
            InputError: the request, the template or the limits refuse it.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        if request.tokens is not None:
            return Encoded(cut(request.tokens, request.truncation))
        if request.chat is not None:
            chat = replace(request.chat, places=request.multimodal)
            return await self.encode_chat(model, chat, request.truncation)
        return await self.encode(
            model, request.text or "", add_special_tokens=request.add_special_tokens, truncate=request.truncation
        )

    async def text_of(self, model: str, ids: bytes) -> str:
        """Return the text of token ids, special tokens included; empty where no tokenizer here can tell.

        Raises:
            UnknownModelError: no backend knows the model.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        return (await self._ask(model, lambda engine: engine.text(ids)))[0]

    async def load(self, model: str) -> str:
        """Load a model's tokenizer now and return the backend that has it.

        Raises:
            UnknownModelError: no backend knows the model.
            BadModelError: the model's files are no good.
            BackendError: no backend that may know the model answered.
        """
        _, backend = await self._ask(model, lambda engine: engine.size_bytes)
        return backend

    def models(self) -> list[str]:
        """Return the models whose tokenizers are loaded."""
        return self._loaded.models()

    @property
    def loads(self) -> int:
        """How many loads were begun since the start."""
        return self._loaded.loads

    def close(self) -> None:
        """Stop the threads and give everything back; calls under way end first."""
        self._aside.close()
        for executor in (self._loading, self._waiting, self._working, self._foreign):
            executor.shutdown(wait=True, cancel_futures=True)
        self._loaded.close()
        for backend in self._backends:
            backend.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _render_beside(self, job: bytes) -> bytes:
        try:
            return self._aside.run(RENDER, job, timeout_seconds=self._limits.template_wait_seconds)
        except TooLargeError as error:
            raise TemplateLimitError(str(error)) from error

    @contextmanager
    def _template_place(self, chat: ChatInput) -> Iterator[Executor | None]:
        """Give the threads for a chat with a template of its own; None for any other chat.

        Raises:
            BusyError: too many wait already.
        """
        if chat.chat_template is None or not self._settings.request_templates:
            yield None
            return
        if self._waiting_templates >= _WAITING_TEMPLATES:
            raise BusyError(f"{self._waiting_templates} requests with templates of their own wait already; try again")
        self._waiting_templates += 1
        try:
            yield self._foreign
        finally:
            self._waiting_templates -= 1

    async def _ask(
        self,
        model: str,
        work: Callable[[LoadedTokenizer], T],
        executor: Executor | None = None,
        at_once: Callable[[LoadedTokenizer], T | None] | None = None,
    ) -> tuple[T, str]:
        """Run work on the first backend that can do it; returns its result and the backend's name.

        What ``at_once`` finds without a thread is taken instead: a change of threads costs more than a look.
        """
        if not model:
            raise TokenizeInputError("no model is named: tokenizing needs to know whose tokenizer")
        failures: list[tuple[str, UnknownModelError | BadModelError | TokenizerBackendError]] = []
        for backend, name in (
            (backend, name) for backend in self._backends for name in (model, *self._also_named(model))
        ):
            try:
                engine = await _waited(self._loaded.get(backend, name))
                if at_once is not None and (found := at_once(engine)) is not None:
                    return found, backend.name
                threads = executor or (self._waiting if backend.waits else self._working)
                # Not shielded: work that nobody waits for any more need not begin.
                return await asyncio.wrap_future(threads.submit(work, engine)), backend.name
            except (UnknownModelError, BadModelError, TokenizerBackendError) as error:
                failures.append((backend.name, error))
        raise _summary(model, failures)

    def _check_prompt(self, prompt: str) -> None:
        limit = self._limits.prompt_bytes
        # Four bytes a character at most, so most prompts need no encoding to know.
        if len(prompt) * 4 > limit and (size := len(prompt.encode(errors="replace"))) > limit:
            raise PromptLimitError(f"prompt of {size} bytes; the limit is {limit}")


def backends_of(
    settings: TokenizerSettings, making: Making, limits: TokenizerLimits = TOKENIZER_LIMITS
) -> list[TokenizerBackend]:
    """Build the backends that the settings turn on, the nearest first.

    Raises:
        SettingsError: an entry of ``models`` is not MODEL=DIR.
    """
    root = Path(settings.root) if settings.root else None
    found: list[TokenizerBackend] = [LocalBackend(_folders(settings.models), root, making)]
    if settings.hub:
        found.append(HubBackend(models=settings.hub_models, revision=settings.hub_revision, making=making))
    if settings.remote:
        found.append(RemoteBackend(settings.remote, limits.remote_seconds))
    return found


def _by_all_names(
    arguments: Mapping[str, EngineArguments], also_named: Callable[[str], Sequence[str]]
) -> dict[str, EngineArguments]:
    found = {name: given for model, given in arguments.items() for name in also_named(model)}
    return {**found, **arguments}


def _folders(entries: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for entry in entries:
        model, equals, folder = entry.partition("=")
        if not (model and equals and folder):
            raise SettingsError(f"[tokenizer] models: {entry!r} is not MODEL=DIR")
        folders[model] = Path(folder)
    return folders


async def _waited(future: Future[T]) -> T:
    """Wait for a future of a thread; being cancelled here neither stops it nor takes it from others who wait."""
    if future.done() and not future.cancelled():
        return future.result()
    return await asyncio.shield(asyncio.wrap_future(future))


def _summary(
    model: str, failures: Sequence[tuple[str, UnknownModelError | BadModelError | TokenizerBackendError]]
) -> UnknownModelError | BadModelError | TokenizerBackendError:
    """Return one error for what all backends answered: the most telling kind, with every backend's words."""
    if not failures:
        return NoTokenizerError(f"no tokenizer for model {model!r}: no backend is turned on")
    text = f"no tokenizer for model {model!r}: " + "; ".join(f"{name}: {error}" for name, error in failures)
    for kind in (TokenizerBackendError, BadModelError):
        found = [error for _, error in failures if isinstance(error, kind)]
        if found:
            summary: TokenizerBackendError | BadModelError = kind(text)
            summary.__cause__ = found[0]
            return summary
    return NoTokenizerError(text)
