"""Live probe: one prompt sent twice through an engine, and what was predicted beside what came of it.

It costs the engine two short requests of one output token each. The prompt is new with every run, so that the first
request computes it and the second finds it.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
import uuid
from typing import Any, Final

from kvatlas.bridge.engines.http import OPENER
from kvatlas.deploy.doctor.engine import EngineSeen
from kvatlas.deploy.doctor.findings import Finding
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.errors import ClientError

_TIMEOUT_SECONDS: Final = 60.0
_ANSWER_BYTES: Final = 16 * 1024 * 1024
_STEP_SECONDS: Final = 0.1


async def check_probe(
    seen: EngineSeen, block_size_tokens: int, client: ScorerClient, *, wait_seconds: float
) -> list[Finding]:
    """Probe one engine.

    Args:
        seen: the engine, which serves a model; noted as probed once it has computed a prompt.
        block_size_tokens: of the index.
        client: the scorer.
        wait_seconds: how long the index may take to hear of the first request.
    """
    facts, url = seen.facts, seen.url
    assert facts is not None
    model, *others = facts.models
    size = max(block_size_tokens, facts.block_size_tokens or 0)
    text = prompt_text(max(64, 4 * size))
    found = [await _same(url, "tokens", model, [{"prompt": text}], client)]
    found.append(await _same(url, "template", model, [{"messages": chat} for chat in chats(text)], client))
    try:
        await asyncio.to_thread(_complete, url, model, text)
        seen.probed = True
        predicted = await _predicted(client, model, text, wait_seconds)
        cached, count = await asyncio.to_thread(_complete, url, model, text)
    except (ClientError, _EngineRefusedError) as error:
        return [*found, Finding("probe", url, "fail", str(error))]
    if predicted:
        found += [await _spelt(url, other, text, client) for other in others]
    if cached is not None:
        seen.over_tokens = predicted - cached
    spare = size if facts.speculation else 0
    return [*found, *judge(url, predicted, cached, count, spare)]


def judge(
    url: str, predicted: int, cached: int | None, prompt_tokens: int | None, spare_tokens: int = 0
) -> list[Finding]:
    """Return the findings of a prediction and what the engine said afterwards. Pure.

    Args:
        url: the engine.
        predicted: tokens that the scorer said are cached.
        cached: tokens that the engine had cached, None where it does not tell.
        prompt_tokens: of the prompt.
        spare_tokens: so many may be computed again by an engine that decodes speculatively.
    """
    if cached is None:
        said = "its answers have no usage.prompt_tokens_details.cached_tokens"
        held = f"{predicted} tokens predicted; what came of it is not told"
        return [Finding("usage", url, "warn", said), Finding("probe", url, "skip" if predicted else "fail", held)]
    told = Finding("usage", url, "ok", "told in every answer")
    said = f"{predicted} tokens predicted, {cached} of {prompt_tokens} were cached"
    if not predicted - spare_tokens <= cached <= predicted:
        return [told, Finding("probe", url, "fail", said)]
    return [told, Finding("probe", url, "ok" if cached else "warn", said)]


def prompt_text(words: int) -> str:
    """Return a text of at least so many tokens that nobody has sent before."""
    mark = uuid.uuid4().hex
    return f"Probe {mark}. " + " ".join(f"{number} green bottles" for number in range(words))


class _EngineRefusedError(Exception):
    """The engine did not complete the probe."""


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    try:
        with OPENER.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            return json.loads(answer.read(_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            raise _EngineRefusedError(f"{url}: {error.code} {error.read(500).decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise _EngineRefusedError(f"{url}: {error}") from error


def _complete(url: str, model: str, text: str) -> tuple[int | None, int | None]:
    """Send the prompt; returns how many tokens were cached, None where it is not told, and how many it has."""
    answer = _post(f"{url}/v1/completions", {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0})
    usage = answer.get("usage") if isinstance(answer, dict) else None
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return (cached if isinstance(cached, int) else None), (count if isinstance(count, int) else None)


async def _predicted(client: ScorerClient, model: str, text: str, wait_seconds: float) -> int:
    """Return the best match once it has grown and stands still; 0 when nothing came in time."""
    until, best = time.monotonic() + wait_seconds, 0
    while True:
        answer = await asyncio.to_thread(client.score, model, prompt=text, usable_only=True)
        now = max((score.matched_tokens for score in answer.scores.values()), default=0)
        if (now and now == best) or time.monotonic() > until:
            return now
        best = now
        await asyncio.sleep(_STEP_SECONDS)


async def _spelt(url: str, name: str, text: str, client: ScorerClient) -> Finding:
    """Ask for what is cached by another name that clients may spell."""
    try:
        answer = await asyncio.to_thread(client.score, name, prompt=text, usable_only=True)
    except ClientError as error:
        return Finding("model-name", url, "warn", f"{name!r}: {error}")
    if any(score.matched_tokens for score in answer.scores.values()):
        return Finding("model-name", url, "ok", f"{name!r} is known")
    return Finding("model-name", url, "warn", f"the engine is also called {name!r}, and nothing is found by that name")


def chats(text: str) -> list[list[dict[str, str]]]:
    """Return chats of the shapes that templates treat differently: one question, and one that follows an answer."""
    system, question = {"role": "system", "content": "Answer in one word."}, {"role": "user", "content": text}
    answered = [{"role": "assistant", "content": "Bottles.\n"}, {"role": "user", "content": " How many? "}]
    return [[system, question], [question, *answered]]


async def _same(url: str, check: str, model: str, each: list[dict[str, Any]], client: ScorerClient) -> Finding:
    """Compare the scorer's tokens of texts or chats with those of the engine itself."""
    count = 0
    for number, asked in enumerate(each):
        try:
            answer = await asyncio.to_thread(_post, f"{url}/tokenize", {"model": model, **asked})
            theirs = answer.get("tokens") if isinstance(answer, dict) else None
            if not isinstance(theirs, list) or not theirs:
                return Finding(check, url, "skip", "the engine does not tell its tokens")
            told = await asyncio.to_thread(client.call, "Tokenize", score_request(model, **asked))
        except _EngineRefusedError as error:
            return Finding(check, url, "skip", f"the engine does not tell its tokens: {error}")
        except ClientError as error:
            return Finding(check, url, "fail", str(error))
        mine = list(told.prompts[0].tokens)
        count += len(mine)
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            first = next((at for at, (one, other) in pairs if one != other), min(len(mine), len(theirs)))
            said = f"token {first} differs: {len(theirs)} tokens of the engine's, {len(mine)} of ours"
            return Finding(check, url, "fail", f"{said}, in text {number + 1} of {len(each)}")
    return Finding(check, url, "ok", f"{count} equal tokens")
