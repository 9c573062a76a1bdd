"""``tokenization.TokenizationService`` on top of the pool, for routers that ask for tokens instead of scores.

Like the service they know, failures of a request are answered with ``success = false`` and a text, not with a gRPC
error; so that a client of ours can tell them apart all the same, their kind is in the trailing metadata
``kvatlas-error``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.errors import InputError, UnknownModelError
from kvatlas.scorer.tokenization import convert
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import Encoded
from kvatlas.scorer.tokenization.remote import ERROR_KIND
from kvatlas.scorer.v1 import tokenization_pb2 as pb

#: grpc.aio.ServicerContext; the stubs of grpc leave out its asyncio half.
_Context = Any


class TokenizationServicer:
    """Answers with the pool's tokenizers."""

    def __init__(
        self,
        pool: TokenizerPool,
        turn: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext,
        named: Callable[[str], str] = lambda model: model,
    ) -> None:
        """Take the pool, and what callers are bound by.

        Args:
            pool: the tokenizers.
            turn: makes what a call enters first; refuses where too many are worked on.
            named: turns the name that a caller uses into the one a model is known by; refuses names that are no such.
        """
        self._pool = pool
        self._turn = turn
        self._named = named

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text to token ids, with each token's place in the text."""
        try:
            async with self._turn():
                encoded = await self._pool.encode(
                    self._named(request.model_name),
                    request.input,
                    add_special_tokens=request.add_special_tokens,
                    offsets=True,
                )
        except KvatlasError as error:
            return pb.TokenizeResponse(error_message=_told(error, context))
        places = [end for pair in encoded.offsets or () for end in pair]
        return pb.TokenizeResponse(input_ids=encoded.list(), success=True, offset_pairs=places)

    async def RenderChatTemplate(  # noqa: N802
        self, request: pb.ChatTemplateRequest, context: _Context
    ) -> pb.ChatTemplateResponse:
        """A chat to text."""
        try:
            async with self._turn():
                rendered = await self._pool.render_chat(
                    self._named(request.model_name), convert.chat_of_template_request(request)
                )
        except KvatlasError as error:
            return pb.ChatTemplateResponse(error_message=_told(error, context))
        return pb.ChatTemplateResponse(rendered_prompt=rendered.text, success=True)

    async def InitializeTokenizer(  # noqa: N802
        self, request: pb.InitializeTokenizerRequest, context: _Context
    ) -> pb.InitializeTokenizerResponse:
        """Load a model now; how chats are rendered is said with each chat."""
        try:
            async with self._turn():
                await self._pool.load(self._named(request.model_name))
        except KvatlasError as error:
            return pb.InitializeTokenizerResponse(error_message=_told(error, context))
        return pb.InitializeTokenizerResponse(success=True)

    async def RenderChatCompletion(  # noqa: N802
        self, request: pb.RenderChatCompletionRequest, context: _Context
    ) -> pb.RenderChatCompletionResponse:
        """A chat to token ids."""
        try:
            async with self._turn():
                encoded: Encoded = await self._pool.encode_chat(
                    self._named(request.model_name), convert.chat_of_completion(request)
                )
        except KvatlasError as error:
            return pb.RenderChatCompletionResponse(error_message=_told(error, context))
        return pb.RenderChatCompletionResponse(
            request_id=f"chatcmpl-{uuid.uuid4().hex}", token_ids=encoded.list(), success=True
        )

    async def RenderCompletion(  # noqa: N802
        self, request: pb.RenderCompletionRequest, context: _Context
    ) -> pb.RenderCompletionResponse:
        """A prompt to token ids, special tokens added."""
        try:
            async with self._turn():
                encoded = await self._pool.encode(self._named(request.model_name), request.prompt)
        except KvatlasError as error:
            return pb.RenderCompletionResponse(error_message=_told(error, context))
        return pb.RenderCompletionResponse(
            request_id=f"cmpl-{uuid.uuid4().hex}", token_ids=encoded.list(), success=True
        )


def _told(error: KvatlasError, context: _Context) -> str:
    kind = "unknown-model" if isinstance(error, UnknownModelError) else "input" if isinstance(error, InputError) else ""
    if kind:
        context.set_trailing_metadata(((ERROR_KIND, kind),))
    return str(error)
