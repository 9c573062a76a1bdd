"""Tokenizing by another service that speaks ``tokenization.TokenizationService``: ours or llm-d's."""

from __future__ import annotations

import json
from typing import Any, Final

import grpc

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.scorer.tokenization import convert
from kvatlas.scorer.tokenization.errors import NoTokenizerError, TokenizeInputError, TokenizerBackendError
from kvatlas.scorer.tokenization.records import ChatInput, Encoded, Truncation
from kvatlas.scorer.v1 import tokenization_pb2 as pb

#: Trailing metadata in which our own service names the kind of a failure.
ERROR_KIND: Final = "kvatlas-error"
_OPTIONS: Final = [("grpc.max_receive_message_length", 256 * 2**20), ("grpc.max_send_message_length", 256 * 2**20)]
_REFUSED: Final = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE}


class RemoteEngine:
    """One model at another tokenizer service."""

    size_bytes = 0

    def __init__(self, model: str, stub: Any, timeout_seconds: float) -> None:
        self._model = model
        self._stub = stub
        self._timeout_seconds = timeout_seconds

    def encode(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None, offsets: bool) -> Encoded:
        """Tokenize one text."""
        request = pb.TokenizeRequest(input=text, model_name=self._model, add_special_tokens=add_special_tokens)
        answer = self.ask(self._stub.Tokenize, request)
        places = list(zip(answer.offset_pairs[::2], answer.offset_pairs[1::2], strict=True)) if offsets else None
        cut = _cut(truncation)
        return Encoded(pack_tokens(answer.input_ids[cut]), offsets=places[cut] if places is not None else None)

    def known(self, text: str, *, add_special_tokens: bool, truncation: Truncation | None) -> Encoded | None:
        """Nothing is known without asking."""

    def render(self, chat: ChatInput) -> str:
        """Render a chat as text."""
        request = pb.ChatTemplateRequest(
            conversation_turns=[pb.ConversationTurn(messages=[convert.to_message(item) for item in chat.messages])],
            tools=[pb.ToolDescription(tool=convert.to_value(tool).struct_value.fields) for tool in chat.tools or ()],
            documents=[
                pb.Document(document=convert.to_value(document).struct_value.fields)
                for document in chat.documents or ()
            ],
            chat_template=chat.chat_template or "",
            continue_final_message=chat.continue_final_message,
            add_generation_prompt=chat.add_generation_prompt,
            chat_template_kwargs={key: convert.to_value(value) for key, value in chat.kwargs.items()},
            model_name=self._model,
        )
        text: str = self.ask(self._stub.RenderChatTemplate, request).rendered_prompt
        return text

    def encode_chat(self, chat: ChatInput, truncation: Truncation | None) -> Encoded:
        """Render a chat and tokenize it, both over there."""
        if chat.add_special_tokens or chat.places:
            raise TokenizeInputError(
                "add_special_tokens and multimodal of chats have no place in requests to another tokenizer service"
            )
        kwargs = {**chat.kwargs, **({"documents": chat.documents} if chat.documents is not None else {})}
        if chat.reasoning_effort is not None:
            kwargs = {"enable_thinking": chat.reasoning_effort != "none", **kwargs}
            kwargs["reasoning_effort"] = chat.reasoning_effort
        request = pb.RenderChatCompletionRequest(
            model_name=self._model,
            messages=[convert.to_message(message) for message in chat.messages],
            chat_template=chat.chat_template or "",
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
        )
        if chat.tools is not None:
            request.tools_json = json.dumps(chat.tools, ensure_ascii=False)
        if kwargs:
            request.chat_template_kwargs = json.dumps(kwargs, ensure_ascii=False)
        answer = self.ask(self._stub.RenderChatCompletion, request)
        return Encoded(pack_tokens(answer.token_ids[_cut(truncation)]))

    def text(self, ids: bytes) -> str:  # noqa: ARG002 - the other service tells texts of no tokens
        """Return nothing: what tokens stand for is known over there alone."""
        return ""

    def ask(self, method: Any, request: Any) -> Any:
        """Call the other service.

        Raises:
            TokenizeInputError: it refuses the request itself.
            NoTokenizerError: it does not know the model.
            BackendError: it cannot be reached, is too slow, or failed.
        """
        try:
            answer, call = method.with_call(request, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            failed: Any = error  # what stubs raise also is a Call, which the library's types do not say
            code, text = failed.code(), failed.details()
            if code in _REFUSED:
                raise TokenizeInputError(f"the tokenizer service refuses the request: {text}") from error
            if code is grpc.StatusCode.NOT_FOUND:
                raise NoTokenizerError(f"the tokenizer service: {text}") from error
            raise TokenizerBackendError(f"the tokenizer service failed: {code.name}: {text}") from error
        if not answer.success:
            # Our own service says what kind of failure it was; another's may be ours to answer elsewhere.
            kind = dict(call.trailing_metadata() or ()).get(ERROR_KIND)
            if kind == "input":
                raise TokenizeInputError(f"the tokenizer service refuses the request: {answer.error_message}")
            if kind == "unknown-model":
                raise NoTokenizerError(f"the tokenizer service: {answer.error_message}")
            raise TokenizerBackendError(f"the tokenizer service failed: {answer.error_message}")
        return answer

    def close(self) -> None:
        """The channel is the backend's."""


class RemoteBackend:
    """Models at another tokenizer service, over TCP or a Unix socket."""

    name = "remote"
    waits = True

    def __init__(self, address: str, timeout_seconds: float) -> None:
        connect: Any = grpc.insecure_channel
        self._channel = connect(address, options=_OPTIONS)
        self._stub = stub_of(self._channel, pb)
        self._timeout_seconds = timeout_seconds

    def load(self, model: str) -> RemoteEngine:
        """Have the other service load a model.

        Raises:
            NoTokenizerError: it does not know the model.
            BackendError: it cannot be reached or failed.
        """
        engine = RemoteEngine(model, self._stub, self._timeout_seconds)
        engine.ask(self._stub.InitializeTokenizer, pb.InitializeTokenizerRequest(model_name=model))
        return engine

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _cut(truncation: Truncation | None) -> slice:
    if truncation is None:
        return slice(None)
    if truncation.side != "right":
        return slice(-truncation.tokens, None) if truncation.tokens else slice(0)
    return slice(truncation.tokens)
