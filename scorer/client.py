"""Clients of a scorer, async and sync, over gRPC."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final, Self

import grpc
import grpc.aio

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


def score_request(
    model: str,
    *,
    tokens: Sequence[int] | bytes | None = None,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    lora: str | None = None,
    cache_salt: str | None = None,
    pods: Sequence[str] = (),
    **more: Any,
) -> pb.ScoreRequest:
    """Build a request.

    Args:
        model: model name.
        tokens: token ids, or packed little-endian u32; they travel packed.
        prompt: text.
        messages: chat messages as the OpenAI API has them.
        tools: what the chat template gets as its tools.
        documents: what it gets as its documents.
        template_kwargs: further arguments of the chat template.
        lora: adapter name.
        cache_salt: salt of the tenant.
        pods: pod ids to consider; empty means all.
        more: further fields of ``ScoreRequest``.
    """
    request = pb.ScoreRequest(model=model, lora=lora or "", cache_salt=cache_salt or "", pods=pods, **more)
    if tokens is not None:
        request.tokens_packed = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
    if prompt is not None:
        request.prompt = prompt
    if messages is not None:
        request.chat.SetInParent()
        request.chat.messages.extend(_message(message) for message in messages)
    for name, value in (("tools", tools), ("documents", documents), ("template_kwargs", template_kwargs)):
        if value is not None:
            setattr(request.chat, f"{name}_json", json.dumps(value, ensure_ascii=False))
    return request


def _message(message: Mapping[str, Any]) -> pb.ChatMessage:
    """Return a chat message with all its fields: what is left out here would be missing in the prompt."""
    fields = dict(message)
    found = pb.ChatMessage(role=fields.pop("role"))
    content = fields.pop("content", None)
    if isinstance(content, str):
        found.content = content
    elif content is not None:
        found.parts_json = json.dumps(content, ensure_ascii=False)
    else:
        fields["content"] = None  # not the same as an empty text to templates that take parts
    if calls := fields.pop("tool_calls", None):
        found.tool_calls_json = json.dumps(calls, ensure_ascii=False)
    for name in ("tool_call_id", "name"):
        if isinstance(fields.get(name), str):
            setattr(found, name, fields.pop(name))
    if fields:
        found.extra_json = json.dumps(fields, ensure_ascii=False)
    return found


def channel_credentials(
    ca: bytes | None, certificate: bytes | None = None, key: bytes | None = None
) -> grpc.ChannelCredentials:
    """Return TLS credentials: the server's CA, and the client's own pair for mutual TLS."""
    return grpc.ssl_channel_credentials(ca, key, certificate)


class ScorerClient:
    """A blocking client; use as a context manager."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout_seconds: float = 10.0,
    ) -> None:
        """Connect on first use.

        Args:
            address: ``host:port`` or ``unix:PATH``.
            token: bearer token.
            credentials: TLS credentials; None connects in the clear.
            timeout_seconds: deadline of each call.
        """
        self._channel = (
            grpc.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=_OPTIONS)
        )
        self._stub = stub_of(self._channel, pb)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout = timeout_seconds

    def call(self, name: str, request: Any) -> Any:
        """Call one unary RPC by name.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        try:
            return getattr(self._stub, name)(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _client_error(error) from error

    def score(self, model: str, **fields: Any) -> pb.ScoreResponse:
        """Score one prompt; arguments of :func:`score_request`.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.ScoreResponse = self.call("Score", score_request(model, **fields))
        return answer

    def score_batch(self, requests: Sequence[pb.ScoreRequest]) -> list[pb.ScoreResponse]:
        """Score many prompts, see :func:`score_request`; an answer whose prompt cannot be scored has ``error`` set.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        return list(self.call("ScoreBatch", pb.ScoreBatchRequest(requests=requests)).responses)

    def pick(self, request: pb.ScoreRequest, **fields: Any) -> pb.PickResponse:
        """Choose a pod; further fields of ``PickRequest``.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.PickResponse = self.call("Pick", pb.PickRequest(request=request, **fields))
        return answer

    def explain(self, model: str, **fields: Any) -> pb.ExplainResponse:
        """Say block by block who holds a prompt; arguments of :func:`score_request`.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.ExplainResponse = self.call("Explain", score_request(model, **fields))
        return answer

    def report_decision(self, request_id: str, pod: str, **fields: Any) -> pb.ReportDecisionResponse:
        """Tell all scorers where a request went; further fields of ``ReportDecisionRequest``.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        request = pb.ReportDecisionRequest(request_id=request_id, pod=pod, **fields)
        answer: pb.ReportDecisionResponse = self.call("ReportDecision", request)
        return answer

    def list_pods(self, model: str = "", *, gone: bool = False) -> list[pb.PodInfo]:
        """List the pods.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        return list(self.call("ListPods", pb.ListPodsRequest(model=model, all=gone)).pods)

    def watch_pods(self, model: str = "", *, gone: bool = False) -> Iterator[pb.PodInfo]:
        """Yield all pods, then each change, until the caller stops.

        Raises:
            ClientError: the scorer refused it or went away.
        """
        try:
            yield from self._stub.WatchPods(pb.ListPodsRequest(model=model, all=gone), metadata=self._metadata)
        except grpc.RpcError as error:
            raise _client_error(error) from error

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncScorerClient:
    """The same for asyncio; use as an async context manager."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout_seconds: float = 10.0,
    ) -> None:
        """Connect on first use; arguments as for :class:`ScorerClient`."""
        self._channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        )
        self._stub = stub_of(self._channel, pb)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout = timeout_seconds

    async def call(self, name: str, request: Any, *, token: str = "") -> Any:
        """Call one unary RPC by name; ``token`` is for this call alone, in place of the client's.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        metadata = (("authorization", f"Bearer {token}"),) if token else self._metadata
        try:
            return await getattr(self._stub, name)(request, timeout=self._timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise _client_error(error) from error

    async def score(self, model: str, **fields: Any) -> pb.ScoreResponse:
        """Score one prompt; arguments of :func:`score_request`.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.ScoreResponse = await self.call("Score", score_request(model, **fields))
        return answer

    async def score_batch(self, requests: Sequence[pb.ScoreRequest]) -> list[pb.ScoreResponse]:
        """Score many prompts, see :func:`score_request`; an answer whose prompt cannot be scored has ``error`` set.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        return list((await self.call("ScoreBatch", pb.ScoreBatchRequest(requests=requests))).responses)

    async def pick(self, request: pb.ScoreRequest, **fields: Any) -> pb.PickResponse:
        """Choose a pod; further fields of ``PickRequest``.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.PickResponse = await self.call("Pick", pb.PickRequest(request=request, **fields))
        return answer

    async def explain(self, model: str, **fields: Any) -> pb.ExplainResponse:
        """Say block by block who holds a prompt; arguments of :func:`score_request`.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        answer: pb.ExplainResponse = await self.call("Explain", score_request(model, **fields))
        return answer

    async def report_decision(self, request_id: str, pod: str, **fields: Any) -> pb.ReportDecisionResponse:
        """Tell all scorers where a request went; further fields of ``ReportDecisionRequest``.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        request = pb.ReportDecisionRequest(request_id=request_id, pod=pod, **fields)
        answer: pb.ReportDecisionResponse = await self.call("ReportDecision", request)
        return answer

    async def list_pods(self, model: str = "", *, gone: bool = False) -> list[pb.PodInfo]:
        """List the pods.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        return list((await self.call("ListPods", pb.ListPodsRequest(model=model, all=gone))).pods)

    async def watch_pods(self, model: str = "", *, gone: bool = False) -> AsyncIterator[pb.PodInfo]:
        """Yield all pods, then each change, until the caller stops.

        Raises:
            ClientError: the scorer refused it or went away.
        """
        try:
            async for info in self._stub.WatchPods(pb.ListPodsRequest(model=model, all=gone), metadata=self._metadata):
                yield info
        except grpc.RpcError as error:
            raise _client_error(error) from error

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _client_error(error: Any) -> ClientError:
    return ClientError(error.code().name, error.details() or "no reason given")
