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
from kvatlas.deploy.doctor.findings import Finding
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError

_TIMEOUT_SECONDS: Final = 60.0
_ANSWER_BYTES: Final = 16 * 1024 * 1024
_STEP_SECONDS: Final = 0.1


async def check_probe(
    url: str, model: str, block_size_tokens: int, client: ScorerClient, *, wait_seconds: float
) -> list[Finding]:
    """Probe one engine.

    Args:
        url: its API.
        model: name to ask for.
        block_size_tokens: of engine or index, the larger; the prompt is several blocks long.
        client: the scorer.
        wait_seconds: how long the index may take to hear of the first request.
    """
    text = prompt_text(max(64, 4 * block_size_tokens))
    found = [await _tokens(url, model, text, client)]
    try:
        await asyncio.to_thread(_complete, url, model, text)
        predicted = await _predicted(client, model, text, wait_seconds)
        cached, count = await asyncio.to_thread(_complete, url, model, text)
    except (ClientError, _EngineRefusedError) as error:
        return [*found, Finding("probe", url, "fail", str(error))]
    return [*found, *judge(url, predicted, cached, count)]


def judge(url: str, predicted: int, cached: int | None, prompt_tokens: int | None) -> list[Finding]:
    """Return the findings of a prediction and what the engine said afterwards. Pure."""
    if cached is None:
        said = "its answers have no usage.prompt_tokens_details.cached_tokens"
        held = f"{predicted} tokens predicted; what came of it is not told"
        return [Finding("usage", url, "warn", said), Finding("probe", url, "skip" if predicted else "fail", held)]
    told = Finding("usage", url, "ok", "told in every answer")
    said = f"{predicted} tokens predicted, {cached} of {prompt_tokens} were cached"
    if predicted != cached:
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


async def _tokens(url: str, model: str, text: str, client: ScorerClient) -> Finding:
    """Compare block keys of the text with those of the engine's own token ids: equal keys are equal tokens."""
    try:
        answer = await asyncio.to_thread(_post, f"{url}/tokenize", {"model": model, "prompt": text})
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or not ids:
            return Finding("tokens", url, "skip", "the engine does not tell its tokens")
        mine = await asyncio.to_thread(client.explain, model, prompt=text)
        theirs = await asyncio.to_thread(client.explain, model, tokens=ids)
    except _EngineRefusedError as error:
        return Finding("tokens", url, "skip", f"the engine does not tell its tokens: {error}")
    except ClientError as error:
        return Finding("tokens", url, "fail", str(error))
    ours, its = ([block.key for block in side.blocks] for side in (mine, theirs))
    if ours == its:
        return Finding("tokens", url, "ok", f"{len(ids)} tokens, {len(its)} equal blocks")
    first = next((at for at, pair in enumerate(zip(ours, its, strict=False)) if pair[0] != pair[1]), len(its))
    return Finding(
        "tokens", url, "fail", f"block {first} differs: {len(its)} blocks of the engine's, {len(ours)} of ours"
    )
