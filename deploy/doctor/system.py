"""Checks of those who answer: the scorer, what it knows of the engines, and a picker's view of load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from kvatlas.bridge.engines.http import get_page
from kvatlas.deploy.doctor.engine import EngineSeen
from kvatlas.deploy.doctor.findings import Finding
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: Tokens that no prompt has: enough blocks to ask every partition for.
_ODD_TOKENS: Final = range(2**31, 2**31 + 4096)


async def check_scorer(client: ScorerClient, address: str, engines: Sequence[EngineSeen]) -> list[Finding]:
    """Check the scorer, and what it knows of the engines."""
    where = f"scorer {address}"
    try:
        pods = await asyncio.to_thread(client.list_pods)
        answer = await _ask(client, engines)
    except ClientError as error:
        return [Finding("scorer", where, "fail", str(error))]
    names = {pod.endpoint: pod.pod for pod in pods}
    for source in (source for seen in engines for source in seen.sources):
        source.known_as = names.get(source.source.live, "")
    if answer.freshness.partial:
        silent = sorted(each.partition for each in answer.freshness.partitions if each.role == "unanswered")
        said = (
            f"no worker answers it for partitions {', '.join(map(str, silent))}" if silent else "its index is partial"
        )
        return [Finding("scorer", where, "fail", said), *judge_pods(pods, engines)]
    return [Finding("scorer", where, "ok", f"knows {len(pods)} pods"), *judge_pods(pods, engines)]


async def block_size(client: ScorerClient, engines: Sequence[EngineSeen]) -> int | None:
    """Return the index's block size (tokens) as the scorer says it; None where it does not."""
    try:
        return (await _ask(client, engines)).block_size_tokens or None
    except ClientError:
        return None


async def _ask(client: ScorerClient, engines: Sequence[EngineSeen]) -> pb.ScoreResponse:
    models = [seen.facts.models[0] for seen in engines if seen.facts is not None and seen.facts.models]
    return await asyncio.to_thread(client.score, models[0] if models else "any", tokens=_ODD_TOKENS)


def judge_pods(pods: Sequence[pb.PodInfo], engines: Sequence[EngineSeen]) -> list[Finding]:
    """Return whether each engine's pods are known, live, whole, and under the engine's own model name. Pure."""
    found = []
    for seen in engines:
        if seen.facts is None or not seen.sources:
            continue
        lives = {source.source.live for source in seen.sources}
        mine = [pod for pod in pods if pod.endpoint in lives]
        if len(mine) < len(lives):
            unknown = ", ".join(sorted(lives - {pod.endpoint for pod in mine}))
            found.append(Finding("pods", seen.url, "fail", f"the scorer knows no pod of {unknown}"))
            continue
        dead = [f"{pod.pod} is {pod.state}" for pod in mine if pod.state != "live"]
        names = ", ".join(pod.pod for pod in mine)
        found.append(Finding("pods", seen.url, "fail" if dead else "ok", "; ".join(dead) or f"{names} live"))
        odd = sorted({pod.model for pod in mine} - set(seen.facts.models)) if seen.facts.models else []
        said = f"the index says {', '.join(map(repr, odd))}, the engine serves {', '.join(seen.facts.models)}"
        served = ", ".join(sorted({pod.model for pod in mine}))
        found.append(Finding("model-name", seen.url, "fail" if odd else "ok", said if odd else served))
        lost = [f"{pod.pod} lost {pod.lost} messages" for pod in mine if pod.lost]
        found.append(Finding("gaps", seen.url, "warn" if lost else "ok", "; ".join(lost) or "nothing was lost"))
    return found


async def check_picker(address: str) -> list[Finding]:
    """Check what a picker knows of endpoints and their load, from its own page of metrics."""
    where = f"picker {address}"
    page = await get_page(f"http://{address}/metrics")
    if page is None or isinstance(page, Exception):
        return [Finding("picker-load", where, "fail", f"no metrics at http://{address}/metrics: {page or 'not there'}")]
    try:
        return [judge_picker(where, page.decode(errors="replace"))]
    except ValueError as error:
        return [Finding("picker-load", where, "fail", f"http://{address}/metrics is no page of metrics: {error}")]


def judge_picker(where: str, page: str) -> Finding:
    """Return whether a picker has endpoints, and fresh load of each. Pure.

    Raises:
        ValueError: it is no page of metrics.
    """
    found = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    endpoints = {one.labels["state"]: one.value for one in found if one.name == "kvatlas_picker_endpoints"}
    if not endpoints:
        return Finding("picker-load", where, "fail", "its metrics are no picker's")
    count, stale = sum(endpoints.values()), sum(s.value for s in found if s.name == "kvatlas_picker_stale_endpoints")
    if not endpoints.get("ready"):
        return Finding("picker-load", where, "fail", f"{count:g} endpoints, none of them ready")
    if not stale:
        return Finding("picker-load", where, "ok", f"fresh load of all {count:g} endpoints")
    reads = {one.labels["result"]: one.value for one in found if one.name == "kvatlas_picker_scrapes_total"}
    why = f"{reads.get('failed', 0):g} reads had no answer, {reads.get('empty', 0):g} pages no load"
    return Finding("picker-load", where, "warn", f"no fresh load of {stale:g} of {count:g} endpoints; {why}")
