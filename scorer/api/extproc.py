"""Envoy's external processor: takes a request apart by the announced body mode, asks for a decision, answers in form.

One picker serves every gateway, because the first message of a stream says how bodies come. What each mode demands:

=================  =====================================================  ==========================================
mode               what is awaited                                        what is answered
=================  =====================================================  ==========================================
no body            the headers                                            headers, with the pod
full duplex        headers, then pieces up to the end or the trailers     headers with the pod, the whole body again
buffered           headers (answered at once), then one body              body, with the pod
buffered in part   the same, and the rest of a large body                 first body with the pod, the rest as it is
streamed at once   headers and pieces up to the end or the trailers       headers with the pod, an answer per piece
streamed           headers                                                headers with a pod chosen without the body
=================  =====================================================  ==========================================

A stream that ends without an answer would send the request on with an empty body, so whatever fails in a decision
becomes a route without a pod here: the gateway then chooses, and the body goes on whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from kvatlas.bridge.model.numbers import whole
from kvatlas.bridge.runtime.logs import whereabouts
from kvatlas.scorer.api import extproc_messages as messages
from kvatlas.scorer.api.http2_server import Http2Server
from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal
from kvatlas.scorer.v1 import extproc_pb2 as pb

log = logging.getLogger(__name__)

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"

#: A longer request id, which would be kept and told to others, gives way to one of ours.
_LONGEST_ID: Final = 256
#: What is read of a response in the stream itself: nothing, its headers where that is free of risk, or all of it.
RESPONSES: Final = ("off", "headers", "body")


class Exchange(Protocol):
    """Learns what became of one request."""

    def headers(self, status: int, kind: str, served: str) -> None:
        """Take the response's status, content type and the address that answered (empty: not told)."""

    def chunk(self, data: bytes) -> None:
        """Take a piece of the response's body."""

    def ended(self, *, complete: bool) -> None:
        """Take the end of what can be seen; ``complete`` says that the response's end was."""


class Decider(Protocol):
    """Decides requests; never raises, and answers within a deadline of its own."""

    async def decide(self, incoming: Incoming) -> Decision:
        """Return where a request goes."""

    def refuse(self, status: int, text: str, reason: str) -> Refusal:
        """Return a refusal that needs no decision; it counts as one."""

    def exchange(self, request_id: str) -> Exchange:
        """Return who learns what becomes of a request."""


class ProcessorOptions:
    """How the processor behaves.

    Args:
        max_body_bytes: larger bodies are refused (413).
        piece_bytes: largest piece of a body sent back in full duplex; some data planes refuse those above 64 KB.
        response: one of :data:`RESPONSES`.
    """

    def __init__(self, *, max_body_bytes: int, piece_bytes: int = 62_000, response: str = "headers") -> None:
        assert response in RESPONSES
        self.max_body_bytes = max_body_bytes
        self.piece_bytes = piece_bytes
        self.response = response


class _Watching:
    """Reads under way of streams that only watch a response; ended all at once when the process leaves.

    Attributes:
        over: whether the process leaves.
    """

    def __init__(self) -> None:
        self.over = False
        self._reads: set[asyncio.Future[Any]] = set()

    def leave(self) -> None:
        """End all reads, and those to come at once."""
        self.over = True
        for read in list(self._reads):
            read.cancel()

    async def read(self, context: Any) -> Any:
        """Return the next message, or the end of the stream; the latter also when the process leaves."""
        if self.over:
            return grpc.aio.EOF
        read = asyncio.ensure_future(context.read())
        self._reads.add(read)
        try:
            return await read
        except asyncio.CancelledError:
            if not self.over or not read.cancelled():
                raise
            return grpc.aio.EOF
        finally:
            self._reads.discard(read)


class ExternalProcessor:
    """Serves ``Process``.

    Attributes:
        open: streams that are open now.
    """

    def __init__(self, decider: Decider, options: ProcessorOptions) -> None:
        self.open = 0
        self._decider = decider
        self._options = options
        self._watching = _Watching()

    def add_to(self, server: Http2Server) -> None:
        """Add the method to a server, under Envoy's name of the service."""
        server.add_registered_method_handlers(
            SERVICE,
            {
                "Process": grpc.stream_stream_rpc_method_handler(
                    self.process,
                    request_deserializer=messages.request_of,
                    response_serializer=messages.serialized,
                )
            },
        )

    def leave(self) -> None:
        """Return from streams that only watch a response, between two pieces: Envoy passes the rest on by itself."""
        self._watching.leave()

    async def process(self, _requests: Any, context: Any) -> None:
        """Serve one stream, which is one HTTP request, or what an observing filter sees of one."""
        self.open += 1
        try:
            first = await context.read()
            if first is grpc.aio.EOF:
                return
            if first.observability_mode:
                await self._observe(first, context)
                return
            if first.WhichOneof("request") != "request_headers":
                return  # nothing was announced and nothing is expected: Envoy goes on by itself
            await _Stream(self._decider, self._options, context, first, self._watching).run()
        finally:
            self.open -= 1

    async def _observe(self, message: Any, context: Any) -> None:
        """Read a response through a filter that does not wait for us."""
        exchange: Exchange | None = None
        complete = False
        try:
            # Envoy keeps such a stream open for seconds after its last message.
            while message is not grpc.aio.EOF and not complete:
                kind = message.WhichOneof("request")
                if kind == "response_headers":
                    headers = messages.headers_of(message.response_headers)
                    request_id = messages.attribute_of(message, names.ATTRIBUTE_REQUEST_ID)
                    exchange = self._decider.exchange(request_id or headers.get(names.REQUEST_ID, ""))
                    _tell_headers(exchange, headers, messages.served_of(message))
                    complete = message.response_headers.end_of_stream
                elif kind == "response_body" and exchange is not None:
                    _tell(exchange.chunk, message.response_body.body)
                    complete = message.response_body.end_of_stream
                elif kind == "response_trailers":
                    complete = True
                if not complete:
                    message = await context.read()
        finally:
            if exchange is not None:
                _tell(exchange.ended, complete=complete)


def _tell_headers(exchange: Exchange, headers: Mapping[str, str], served: str) -> None:
    _tell(exchange.headers, whole(headers.get(":status", ""), 999) or 0, headers.get("content-type", ""), served)


def _tell(told: Callable[..., None], *what: Any, **more: Any) -> None:
    """Hand on what became of a request; a fault in what is made of it is no reason to cut a response."""
    try:
        told(*what, **more)
    except Exception as error:  # noqa: BLE001 - whatever it is, the response goes on
        log.error("what became of a request was not noted: %s", whereabouts(error))


class _Stream:
    """One request on its way through the processor."""

    def __init__(
        self,
        decider: Decider,
        options: ProcessorOptions,
        context: Any,
        first: pb.ProcessingRequest,
        watching: _Watching,
    ) -> None:
        self._decider = decider
        self._options = options
        self._context = context
        self._watching = watching
        self._headers = messages.headers_of(first.request_headers)
        self._subset = messages.subset_of(first)
        self._ended = first.request_headers.end_of_stream
        config = first.protocol_config
        # A gateway that announces nothing is older than the announcement; those use full duplex.
        announced = first.HasField("protocol_config")
        self._mode = config.request_body_mode if announced else messages.FULL_DUPLEX
        self._response_mode = config.response_body_mode if announced else messages.FULL_DUPLEX
        self._at_once = config.send_body_without_waiting_for_header_response
        given = self._headers.get(names.REQUEST_ID, "")
        self._request_id = given if len(given) <= _LONGEST_ID else ""
        self._complete = False  # the response's end was seen
        self._left: Any = None  # a message that was read and belongs to the response

    async def run(self) -> None:
        """Decide the request, then watch the response as far as that is wanted."""
        if await self._request():
            await self._response()

    # --- the request ----------------------------------------------------------------------------------------------

    async def _request(self) -> bool:
        """Answer the request's part; returns whether the stream goes on."""
        mode = self._mode
        if self._ended or mode == messages.NONE or (mode == messages.STREAMED and not self._at_once):
            decision = await self._decide(None)
            return await self._send(decision, messages.headers_answer)
        if mode in (messages.BUFFERED, messages.BUFFERED_PARTIAL):
            return await self._buffered()
        return await self._collected()

    async def _decide(self, body: bytes | None, *, whole: bool = True) -> Decision:
        incoming = Incoming(self._headers, body, self._subset, self._request_id, whole)
        try:
            decision = await self._decider.decide(incoming)
        except Exception as error:  # noqa: BLE001 - whatever it is, the body must go on
            log.error("a decision failed; the gateway chooses: %s", whereabouts(error))
            decision = Destination(())
        if isinstance(decision, Destination) and decision.request_id:
            self._request_id = decision.request_id
        return decision

    async def _send(self, decision: Decision, answer: Any) -> bool:
        if isinstance(decision, Refusal):
            await self._context.write(messages.refusal(decision))
            return False
        await self._context.write(answer(decision))
        return True

    async def _buffered(self) -> bool:
        """Answer headers at once, then the one body; trailers alone end a request that has none."""
        context = self._context
        await context.write(messages.EMPTY_HEADERS)
        kind = None  # a gateway that is newer than this build may send what it does not know
        while kind is None:
            message = await context.read()
            if message is grpc.aio.EOF:
                return False
            kind = message.WhichOneof("request")
        if kind == "request_trailers":  # headers are on hold no more: the pod can be named no longer
            await context.write(messages.EMPTY_TRAILERS)
            return True
        if kind != "request_body":
            self._left = message  # a local reply of Envoy, for a body past its limit
            return True
        body = message.request_body.body
        partial = self._mode == messages.BUFFERED_PARTIAL and not message.request_body.end_of_stream
        decision = self._too_large(len(body)) or await self._decide(body, whole=not partial)
        if partial and isinstance(decision, Destination) and decision.body is not None:
            decision = decision._replace(body=None)  # the rest of the old one follows
        return await self._send(decision, messages.body_answer)

    async def _collected(self) -> bool:
        """Take the pieces up to the end, then answer headers and body together."""
        pieces: list[bytes] = []
        size = 0
        trailers = False
        while not self._ended and not trailers:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                return False  # the client is gone
            kind = message.WhichOneof("request")
            if kind == "request_body":
                pieces.append(piece := message.request_body.body)  # each look at the field copies it
                self._ended = message.request_body.end_of_stream
                size += len(piece)
                if (refused := self._too_large(size)) is not None:
                    return await self._send(refused, None)
            elif kind == "request_trailers":
                trailers = True
            elif kind is not None:  # a local reply of Envoy: the request goes nowhere
                self._left = message
                return True
        decision = await self._decide(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if not await self._send(decision, messages.headers_answer):
            return False
        assert isinstance(decision, Destination)
        if self._mode == messages.FULL_DUPLEX:
            await self._send_back(pieces, decision.body, trailers=trailers)
        else:
            for _ in pieces:
                await self._context.write(messages.EMPTY_BODY)
        if trailers:
            await self._context.write(messages.EMPTY_TRAILERS)
        return True

    async def _send_back(self, pieces: list[bytes], changed: bytes | None, *, trailers: bool) -> None:
        """Hand the whole body on; a piece that is small enough goes as it came."""
        most = self._options.piece_bytes
        parts = pieces if changed is None else [changed]
        for number, part in enumerate(parts):
            ended = number == len(parts) - 1 and not trailers
            for answer in messages.body_pieces(part, most, ended=ended):
                await self._context.write(answer)

    def _too_large(self, size: int) -> Refusal | None:
        most = self._options.max_body_bytes
        if size <= most:
            return None
        return self._decider.refuse(413, f"the request has more than {most} bytes", "rejected-too-large")

    # --- the response ---------------------------------------------------------------------------------------------

    async def _response(self) -> None:
        """Read the response as far as the settings and the announced mode make that harmless.

        In full duplex the stream is left right after the request, by returning: then a crash of this process does not
        cut the client's tokens. Leaving on the response's headers would lose the first piece.
        """
        wanted = self._options.response
        if wanted == "off" or (wanted == "headers" and self._response_mode != messages.NONE):
            _tell(self._decider.exchange(self._request_id).ended, complete=False)
            return
        exchange = self._decider.exchange(self._request_id)
        try:
            while (message := await self._next()) is not grpc.aio.EOF:
                await self._respond(message, exchange)
            # Envoy ends the stream of a buffered request with the request itself.
            self._complete = self._complete or (self._mode == messages.BUFFERED and not self._watching.over)
        finally:
            _tell(exchange.ended, complete=self._complete)

    async def _next(self) -> Any:
        if (left := self._left) is not None:
            self._left = None
            return left
        return await self._watching.read(self._context)

    async def _respond(self, message: pb.ProcessingRequest, exchange: Exchange) -> None:
        """Answer one message of the response.

        What it says is noted also where the answer does not go out any more: Envoy is done after the last message and
        may end the stream while we still write.
        """
        kind = message.WhichOneof("request")
        if kind == "response_headers":
            self._complete = message.response_headers.end_of_stream
            _tell_headers(exchange, messages.headers_of(message.response_headers), messages.served_of(message))
            await self._context.write(messages.EMPTY_RESPONSE_HEADERS)
        elif kind == "response_body":
            self._complete = self._complete or message.response_body.end_of_stream
            full = self._response_mode == messages.FULL_DUPLEX
            try:  # handed on first: what we make of it is none of the client's business
                await self._context.write(messages.same_body(message) if full else messages.EMPTY_RESPONSE_BODY)
            finally:
                _tell(exchange.chunk, message.response_body.body)
        elif kind == "response_trailers":
            self._complete = True
            await self._context.write(messages.EMPTY_RESPONSE_TRAILERS)
        elif kind == "request_trailers":
            await self._context.write(messages.EMPTY_TRAILERS)
        elif kind == "request_body":  # the rest of a body that was buffered in part
            await self._context.write(messages.EMPTY_BODY)
