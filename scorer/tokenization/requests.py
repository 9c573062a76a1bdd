"""Request bodies of engines (OpenAI, Anthropic, token ids) to prompts: what the engine will prefill, as values.

Pure: JSON objects in, :class:`EngineRequest` out; no tokenizer, no I/O. Whoever has a body calls :func:`read` and gives
the result to :meth:`~kvatlas.scorer.tokenization.pool.TokenizerPool.tokens_of`, or takes it apart itself.

=====================  ======================================================================================
shape                  body
=====================  ======================================================================================
``completions``        ``POST /v1/completions``: ``prompt`` is a text, token ids, or a list of either
``chat/completions``   ``POST /v1/chat/completions``: ``messages``, ``tools``, ``chat_template_kwargs``, ...
``responses``          ``POST /v1/responses``: ``input``, ``instructions``, ``tools``
``messages``           ``POST /v1/messages`` (Anthropic): ``system``, ``messages``, ``tools``, ``thinking``
``generate``           ``POST /inference/v1/generate``, or an answer of vLLM's ``.../render``: ``token_ids``,
                       ``features``
=====================  ======================================================================================

Every shape may carry ``model``, ``cache_salt``, ``request_id`` and our own fields: ``lora``, ``multimodal`` (places of
items as ``{"identifier", "offset", "length"}`` in the finished prompt), ``pods``, ``strategy`` and ``usable_only``.
Other fields that do not change a prompt are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvatlas.scorer.tokenization import body_fields as fields
from kvatlas.scorer.tokenization.body_chat import chat_of
from kvatlas.scorer.tokenization.body_messages import chat_of_messages
from kvatlas.scorer.tokenization.body_responses import chat_of_responses
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput, Place, Truncation

Shape = Literal["completions", "chat/completions", "responses", "messages", "generate"]
SHAPES: Final[tuple[Shape, ...]] = ("completions", "chat/completions", "responses", "messages", "generate")
#: Prompts of one body, above what anybody may ask for at once; no more of a longer list are read.
MOST_PROMPTS: Final = 256
#: What this shape's requests have and no other's, in the order in which a body without a path is looked at.
_TELLING: Final[tuple[tuple[str, Shape], ...]] = (
    ("token_ids", "generate"),
    ("prompt", "completions"),
    ("messages", "chat/completions"),
    ("input", "responses"),
)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt of a request to an engine. Exactly one of ``text``, ``tokens`` and ``chat`` is not None.

    Attributes:
        model: as the client named it, which may be an alias or an adapter; empty when it named none.
        text: prompt to tokenize.
        tokens: token ids, packed little-endian u32.
        chat: messages and how to render them.
        cache_salt: salt of the tenant, empty for none.
        lora: adapter named beside the model, empty for none.
        multimodal: places of multimodal items in the finished prompt, by offset.
        add_special_tokens: the tokenizer's own special tokens go around ``text``; chats carry it themselves.
        truncation: how a prompt that is too long is cut.
        request_id: the router's id of the request, empty for none.
        pods: pods to consider, empty for all.
        strategy: scoring strategy by name, empty for the model's.
        usable_only: count only what the engine can reuse.
    """

    model: str
    text: str | None = None
    tokens: bytes | None = None
    chat: ChatInput | None = None
    cache_salt: str = ""
    lora: str = ""
    multimodal: tuple[Place, ...] = ()
    add_special_tokens: bool = True
    truncation: Truncation | None = None
    request_id: str = ""
    pods: tuple[str, ...] = ()
    strategy: str = ""
    usable_only: bool = False


def read(shape: Shape, body: Any) -> list[EngineRequest]:
    """Return the prompts of a request body, at least one; all shapes but ``completions`` have exactly one.

    Of more than :data:`MOST_PROMPTS` one too many is returned.

    Args:
        shape: what the body is, see :func:`shape_of` and :func:`shape_of_body`.
        body: the decoded JSON.

    Raises:
        TokenizeInputError: the body is none that an engine takes; names the field.
    """
    if not isinstance(body, Mapping):
        raise TokenizeInputError(f"body: a JSON object is wanted, not {fields.shown(body)}")
    return _READERS[shape](body)


def shape_of(path: str) -> Shape | None:
    """Return the shape of an engine's path such as ``/v1/chat/completions`` (or its ending), None for any other."""
    ending = path.partition("?")[0].strip("/").removesuffix("/render")
    for prefix in ("inference/v1/", "v1/"):
        ending = ending.removeprefix(prefix)
    return next((shape for shape in SHAPES if shape == ending), None)


def shape_of_body(body: Any) -> Shape:
    """Return the shape that a body's fields tell; ``messages`` are taken as those of the chat API.

    Raises:
        TokenizeInputError: they tell none.
    """
    if isinstance(body, Mapping):
        for field, shape in _TELLING:
            if body.get(field) is not None:
                return shape
    raise TokenizeInputError("body: has neither prompt nor messages, input or token_ids")


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": fields.take(body, "model", str) or "",
        "cache_salt": fields.salt_of(body),
        "lora": fields.take(body, "lora", str) or "",
        "multimodal": fields.places_of(body),
        "truncation": fields.truncation_of(body),
        "request_id": fields.take(body, "request_id", str) or "",
        "pods": fields.texts(body, "pods"),
        "strategy": fields.take(body, "strategy", str) or "",
        "usable_only": bool(fields.take(body, "usable_only", bool)),
    }


def _completions(body: Mapping[str, Any]) -> list[EngineRequest]:
    common = _common(body)
    if body.get("prompt_embeds") is not None:
        raise TokenizeInputError("prompt_embeds: blocks of embedded prompts are not known by token ids")
    if body.get("suffix") is not None:
        raise TokenizeInputError("suffix: how it becomes part of the prompt is known to the engine alone")
    special = fields.take(body, "add_special_tokens", bool)
    common["add_special_tokens"] = True if special is None else special
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if common["multimodal"] and len(prompt) > 1:
            raise TokenizeInputError("multimodal: belongs to one prompt, the body has several")
        return [_prompt(entry, f"prompt[{number}]", common) for number, entry in enumerate(prompt[: MOST_PROMPTS + 1])]
    return [_prompt(prompt, "prompt", common)]


def _prompt(prompt: Any, where: str, common: Mapping[str, Any]) -> EngineRequest:
    if isinstance(prompt, str) and prompt:
        return EngineRequest(**common, text=prompt)
    if isinstance(prompt, list) and prompt:
        return EngineRequest(**common, tokens=fields.packed(prompt, where))
    raise TokenizeInputError(f"{where}: a text or a list of token ids is wanted, and neither may be empty")


def _generate(body: Mapping[str, Any]) -> list[EngineRequest]:
    common = _common(body)
    common["truncation"] = None  # the ids are those of the engine already
    features = fields.take(body, "features", dict)
    if features is not None:
        common["multimodal"] = fields.feature_places(features)
    ids = fields.need(body, "token_ids", list)
    if not ids:
        raise TokenizeInputError("token_ids: must not be empty")
    return [EngineRequest(**common, tokens=fields.packed(ids, "token_ids"))]


def _chat_with(reader: Callable[[Mapping[str, Any]], ChatInput]) -> Callable[[Mapping[str, Any]], list[EngineRequest]]:
    def read_chat(body: Mapping[str, Any]) -> list[EngineRequest]:
        common = _common(body)
        return [EngineRequest(**common, chat=reader(body))]

    return read_chat


_READERS: Final[dict[str, Callable[[Mapping[str, Any]], list[EngineRequest]]]] = {
    "completions": _completions,
    "chat/completions": _chat_with(chat_of),
    "responses": _chat_with(chat_of_responses),
    "messages": _chat_with(chat_of_messages),
    "generate": _generate,
}
