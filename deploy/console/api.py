"""What the page asks for, as JSON: each view's figures from the code that the command line uses."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web
from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.errors import DECODE_ERRORS, SettingsError
from kvatlas.bridge.model.block_key import KEY_BYTES, block_keys, pack_tokens, root_key, tenant_of
from kvatlas.deploy.console import asked as questions
from kvatlas.deploy.console.asked import Asked
from kvatlas.deploy.console.costs import Costs
from kvatlas.deploy.console.decisions import DecisionLog, prefixes
from kvatlas.deploy.console.flow import TopicRates
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.console.readers import Reader, Readers
from kvatlas.deploy.console.turns import Turns
from kvatlas.deploy.history.ask import Question
from kvatlas.deploy.history.watch import Picture, Watch
from kvatlas.deploy.whatif.compare import hit_ratios, recorded_first_tokens
from kvatlas.deploy.whatif.recorded import recording
from kvatlas.scorer.api.bodies import HttpBody, Inflight
from kvatlas.scorer.api.bounds import check_name
from kvatlas.scorer.client import score_request
from kvatlas.scorer.errors import ClientError, InputError
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

_LOOK_SECONDS: Final = 1.0
_ROWS: Final = 500
_POLICIES: Final = 8
_TEXT: Final = 2_000
#: Largest bodies: of a question about a prompt, and of one that only names policies.
_ASK_BYTES: Final = 8 * 1024 * 1024
_WHAT_IF_BYTES: Final = 64 * 1024
#: Of all bodies that are read or worked on.
_INFLIGHT_BYTES: Final = 64 * 1024 * 1024
#: Answers up to this size are put into JSON at once: less than a few milliseconds of the event loop.
_AT_ONCE_BYTES: Final = 64 * 1024
#: States of a holder that an event says is there.
_HELD: Final = ("live", "suspect")
_MINUTE_NS: Final = 60 * 1_000_000_000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """Answers the page's questions.

    Args:
        watch: of the fleet and the workers.
        past: questions to the log.
        readers: what readers may see.
        picker: settings of the pickers, for what they reckon.
        topics: rates of the topics.
        decisions: newest decisions kept.

    Attributes:
        restarts: how often the console was started again, for people; None for never.
    """

    def __init__(
        self, watch: Watch, past: Past, readers: Readers, *, picker: PickerSettings, topics: TopicRates, decisions: int
    ) -> None:
        self._watch, self._past, self._readers, self._topics = watch, past, readers, topics
        self.restarts: str | None = None
        self._decisions = DecisionLog(decisions)
        self._picker = picker
        self._costs = Costs(picker)
        self._name = secrets.token_hex(4)
        self._inflight = Inflight(_INFLIGHT_BYTES)
        self._views = Turns("views")
        self._simulations = Turns("simulations", 4)
        self._looking = asyncio.Lock()
        self._picture: tuple[float, Picture | None] = (0.0, None)
        self._flow: tuple[float, list[dict[str, Any]]] = (0.0, [])

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of each question."""
        return [
            ("GET", "/api/picture", self._get_picture),
            ("GET", "/api/topics", self._get_topics),
            ("GET", "/api/decisions", self._get_decisions),
            ("GET", "/api/prefixes", self._get_prefixes),
            ("GET", "/api/timeline", self._get_timeline),
            ("GET", "/api/dead-letters", self._get_dead_letters),
            ("GET", "/api/span", self._get_span),
            ("GET", "/api/diff", self._get_diff),
            ("GET", "/api/why", self._get_why),
            ("GET", "/api/stretch", self._get_stretch),
            ("POST", "/api/ask", self._post_ask),
            ("POST", "/api/what-if", self._post_what_if),
        ]

    def take(self, _key: bytes | None, value: bytes | None) -> None:
        """Take a record of ``kv-decisions``."""
        record = self._decisions.apply(value)
        if record is not None:
            self._costs.take(record)

    # --- what is there ----------------------------------------------------------------------------------------------

    async def _get_picture(self, _request: web.Request) -> web.Response:
        """Return the fleet and the workers; a look is for all who ask, and goes on when one of them goes away."""
        return _json(await asyncio.shield(self._look_at_pods()))

    async def _look_at_pods(self) -> Picture:
        async with self._looking:
            looked, picture = self._picture
            if picture is None or time.monotonic() - looked >= _LOOK_SECONDS:
                picture = await self._watch.look()
                self._picture = (time.monotonic(), picture)
        return picture

    async def _get_topics(self, _request: web.Request) -> web.Response:
        return _json({"topics": await asyncio.shield(self._look_at_topics()), "restarts": self.restarts})

    async def _look_at_topics(self) -> list[dict[str, Any]]:
        async with self._looking:
            looked, rows = self._flow
            if not rows or time.monotonic() - looked >= _LOOK_SECONDS:
                rows = await self._topics.look()
                self._flow = (time.monotonic(), rows)
        return rows

    async def _get_timeline(self, request: web.Request) -> web.Response:
        return _json({"marks": await self._past.timeline(_needed(request, "pod"), _since(request))})

    async def _get_dead_letters(self, request: web.Request) -> web.Response:
        await self._readers.check_all(_reader(request))
        return _json({"letters": await self._past.dead_letters(_since(request))})

    # --- decisions --------------------------------------------------------------------------------------------------

    async def _tenant(self, request: web.Request) -> str | None:
        """Return whose decisions a reader may see, None for everybody's."""
        salt = await self._readers.salt_of(_reader(request))
        return None if salt is None else tenant_of(salt)

    async def _get_decisions(self, request: web.Request) -> web.Response:
        tenant = await self._tenant(request)
        rows = [one.row() for one in self._decisions.after(_number(request, "after", 0), _ROWS, tenant)]
        return _json({"log": self._name, "rows": rows, "unreadable": self._decisions.unreadable})

    async def _get_prefixes(self, request: web.Request) -> web.Response:
        tenant, minutes = await self._tenant(request), _number(request, "minutes", 15)
        model = request.query.get("model", "")
        check_name(model, "model")
        requests = list(self._decisions.since(time.time_ns() - minutes * _MINUTE_NS, tenant))
        tree, looked = await self._views.run(lambda _gone: prefixes(requests, model))
        return _json({"tree": tree, "requests": looked, "minutes": minutes})

    async def _get_stretch(self, request: web.Request) -> web.Response:
        """Return the text of a stretch that ends with a block, and on how many pods per tier all before it is held too.

        The scorer says whether the reader may see it.
        """
        reader, key = _reader(request), _key(request)
        await self._readers.salt_of(reader)
        found = await self._past.beginning(key, _since(request))
        if found is None:
            return _json({"text": "", "why": "no event of this time carries its tokens: they are stripped, or older"})
        asked = score_request(found.model, tokens=found.tokens, lora=found.lora, cache_salt=found.cache_salt)
        told: pb.ExplainResponse = await self._readers.call(reader, "Explain", asked)
        if not told.blocks or bytes.fromhex(told.blocks[-1].key) != key:
            return _json({"text": "", "why": "its blocks are not named by text alone"})
        from_token = _number(request, "first", 0) * told.scored.block_size_tokens
        asked = score_request(
            found.model, tokens=found.tokens[from_token:], lora=found.lora, cache_salt=found.cache_salt
        )
        read: pb.TokenizeResponse = await self._readers.call(reader, "Tokenize", asked)
        text = read.prompts[0].text
        why = "" if text else "the scorer has no tokenizer of this model at hand"
        question = None  # a salt is not put on the page, so what has one cannot be asked from there
        if not found.cache_salt:
            question = {"model": found.model, "tokens": found.tokens, **({"lora": found.lora} if found.lora else {})}
        return _json({"text": text[:_TEXT], "why": why, "holders": _holders(told), "question": question})

    async def _get_why(self, request: web.Request) -> web.Response:
        await self._readers.check_all(_reader(request))
        return _json(await self._past.story(_needed(request, "request"), float(_number(request, "after", 10))))

    async def _post_what_if(self, request: web.Request) -> web.Response:
        await self._readers.check_all(_reader(request))
        body = await self._object(request)
        policies, queued = (_policies(body, name) for name in ("policies", "queueing"))
        if not policies and not queued:
            raise SettingsError("policies or queueing: names as `kvatlas whatif` takes them")
        blocks = body.get("blocks", 2048)
        if not isinstance(blocks, int) or not 0 < blocks <= 10_000_000:
            raise SettingsError("blocks: how many blocks a pod's cache has")
        since, until = str(body.get("since") or "-1h"), str(body.get("until") or "latest")
        decisions = await self._past.decisions(since, until)

        def work(gone: threading.Event) -> dict[str, Any]:
            def wanted(_row: object) -> bool:
                return not gone.is_set()

            found = recording(decisions)
            return {
                "requests": len(found.arrivals),
                "skipped": found.skipped,
                "pods": len(found.pods),
                "rows": list(itertools.takewhile(wanted, hit_ratios(found, policies, blocks))),
                "first_tokens": list(
                    itertools.takewhile(wanted, recorded_first_tokens(found, queued, blocks, self._picker))
                ),
            }

        return _json(await self._simulations.run(work))

    async def _object(self, request: web.Request) -> dict[str, Any]:
        with HttpBody(request, _WHAT_IF_BYTES, self._inflight) as body:
            try:
                return msgspec.json.decode(await body.read(), type=dict[str, Any])
            except DECODE_ERRORS as error:
                raise InputError(f"body: {error}") from error

    # --- ask --------------------------------------------------------------------------------------------------------

    async def _get_span(self, _request: web.Request) -> web.Response:
        return _json(await self._past.span())

    async def _get_diff(self, request: web.Request) -> web.Response:
        first, second = _needed(request, "first"), request.query.get("second") or "latest"
        return _json({"pods": await self._past.changes(first, second)})

    async def _post_ask(self, request: web.Request) -> web.Response:
        reader = _reader(request)
        with HttpBody(request, _ASK_BYTES, self._inflight) as body:
            return await self._answer(reader, *questions.read(await body.read()))

    async def _answer(self, reader: Reader, question: Asked, asked: pb.ScoreRequest) -> web.Response:
        explained: pb.ExplainResponse | None = None
        try:
            explained = await self._readers.call(reader, "Explain", asked)
        except ClientError as error:
            if error.code != "PERMISSION_DENIED" or question.at:
                raise
        if question.at:
            assert explained is not None
            return _json(await self._then(reader, question, asked, explained))
        scored = await self._readers.call(reader, "Score", asked) if explained is None else explained.scored
        usable = pb.ScoreRequest()
        usable.CopyFrom(asked)
        usable.usable_only = True
        self._costs.look(self._watch.pods)
        model = self._model(question, explained)[0]
        costs = self._costs.of(model, await self._readers.call(reader, "Score", usable), question.session_id or "")

        def shown(_gone: threading.Event | None = None) -> web.Response:
            explain = None if explained is None else _plain(explained)
            return _json({"score": _plain(scored), "explain": explain, "costs": costs})

        size = scored.ByteSize() + (0 if explained is None else explained.ByteSize())
        return shown() if size <= _AT_ONCE_BYTES else await self._views.run(shown)

    async def _then(
        self, reader: Reader, question: Asked, asked: pb.ScoreRequest, explained: pb.ExplainResponse
    ) -> dict[str, Any]:
        """Return the answer as of a moment, of the tokens that the scorer makes of the prompt."""
        made: pb.TokenizeResponse = await self._readers.call(reader, "Tokenize", asked)
        tokens = list(made.prompts[0].tokens)
        model, lora = self._model(question, explained, tokens)
        about = Question(tokens=tokens, lora=lora or None, cache_salt=question.cache_salt)
        return await self._past.ask(question.at or "", model, about)

    def _model(
        self, question: Asked, explained: pb.ExplainResponse | None, tokens: list[int] | None = None
    ) -> tuple[str, str]:
        """Return model and adapter as the blocks are named by: a client may ask by an alias, or by the adapter.

        Raises:
            SettingsError: with tokens given: the blocks are named by more than these.
        """
        name, lora = question.model, question.lora or ""
        models = {record.model for record in self._watch.pods.values() if record.model}
        pairs = [(name, lora), *((one, lora) for one in models), *((one, name) for one in models)]
        if tokens is None or explained is None or not explained.blocks:
            return next(((one, other) for one, other in pairs if one in models), pairs[0])
        size, salt = explained.scored.block_size_tokens, question.cache_salt
        first = pack_tokens(tokens[:size])
        for one, other in pairs:
            root = root_key(one, other or None, salt or None)
            if block_keys(root, first, size)[0].hex() == explained.blocks[0].key:
                return one, other
        raise SettingsError("this prompt's blocks are named by more than its text (pictures): the past is not asked")


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _plain(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _reader(request: web.Request) -> Reader:
    return Reader.of(request.headers.get("x-scorer-token", ""), request.headers.get("x-cache-salt", ""))


def _since(request: web.Request) -> str:
    return request.query.get("since") or "-1h"


def _holders(told: pb.ExplainResponse) -> dict[str, int]:
    """Return tier -> pods whose walk reaches the last block there."""
    whole = {pod for pod, score in told.scored.scores.items() if score.matched_blocks == len(told.blocks)}
    best: dict[str, set[str]] = {}
    for holder in told.blocks[-1].holders:
        if holder.pod in whole and holder.state in _HELD:
            best.setdefault(holder.tier, set()).add(holder.pod)
    return {tier: len(pods) for tier, pods in best.items()}


def _needed(request: web.Request, name: str) -> str:
    text = request.query.get(name, "")
    if not text:
        raise SettingsError(f"{name} is missing")
    check_name(text, name)
    return text


def _key(request: web.Request) -> bytes:
    with contextlib.suppress(ValueError):
        key = bytes.fromhex(_needed(request, "key"))
        if len(key) == KEY_BYTES:
            return key
    raise SettingsError(f"key: {2 * KEY_BYTES} hexadecimal digits are wanted")


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, "")
    if text and not (text.isdecimal() and len(text) < 16):
        raise SettingsError(f"{name}: {text[:40]!r} is no number")
    return int(text) if text else default


def _policies(body: dict[str, Any], name: str) -> list[str]:
    found = body.get(name) or []
    if not isinstance(found, list) or len(found) > _POLICIES or not all(isinstance(one, str) for one in found):
        raise SettingsError(f"{name}: a list of up to {_POLICIES} names, as `kvatlas whatif` takes them")
    return found
