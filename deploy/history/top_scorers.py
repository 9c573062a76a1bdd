"""Scorers as their metrics tell them, for ``kvatlas top``: rate, latency, and what came of decisions."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import port_of

_TIMEOUT_SECONDS: Final = 3.0
#: Operations that answer where a prompt should go; the others are looked at, not lived on.
_SCORING: Final = frozenset({"Score", "ScoreBatch", "Pick"})
_ALL: Final = math.inf
#: Outcomes that do not say whether a prediction was right.
_NO_VERDICT: Final = frozenset({"unknown", "cold", "unproven"})


class ScorerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One scorer.

    Attributes:
        scorer: host:port of its telemetry.
        up: whether it answered; everything else is 0 or null where it did not.
        requests_per_second: scoring requests since the look before.
        p50_ms, p99_ms: their time in the scorer since the look before, or since its start where there were none; null
            without any. Bounds of the histogram's buckets limit how exact they are.
        errors: share of them that failed, since its start.
        hit_ratio: of the decisions whose outcome is known, the share that found what was predicted; null without any.
        realised: blocks found over blocks predicted; null without decisions.
        pods: pods that it knows.
        unserved: partitions that no worker answers for, as it sees it.
        disagreements: models that never match and pods whose engine says otherwise, each with its kind.
    """

    scorer: str
    up: bool
    requests_per_second: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    errors: float = 0.0
    hit_ratio: float | None = None
    realised: float | None = None
    pods: int = 0
    unserved: int = 0
    disagreements: list[str] = []


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one page of metrics said, at a moment (monotonic seconds)."""

    moment: float
    requests: float
    failed: float
    buckets: dict[float, float]
    outcomes: dict[str, float]
    predicted: float
    real: float
    pods: int
    unserved: int
    disagreements: list[str] = []


def read_page(text: str, moment: float) -> Sample:
    """Read a scorer's page of metrics.

    Raises:
        ValueError: it is no page of Prometheus metrics.
    """
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(name: str, wanted: Callable[[Mapping[str, str]], bool] = lambda _: True) -> float:
        return sum(sample.value for sample in found if sample.name == name and wanted(sample.labels))

    buckets: dict[float, float] = {}
    outcomes: dict[str, float] = {}
    for sample in found:
        if sample.name == "kvatlas_scorer_request_seconds_bucket" and sample.labels["operation"] in _SCORING:
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
        elif sample.name == "kvatlas_scorer_outcomes_total":
            outcome = sample.labels["outcome"]
            outcomes[outcome] = outcomes.get(outcome, 0.0) + sample.value
    requests = "kvatlas_scorer_requests_total"
    return Sample(
        moment=moment,
        requests=total(requests, lambda labels: labels["operation"] in _SCORING),
        failed=total(requests, lambda labels: labels["operation"] in _SCORING and labels["code"] != "OK"),
        buckets=buckets,
        outcomes=outcomes,
        predicted=total("kvatlas_scorer_predicted_blocks_total"),
        real=total("kvatlas_scorer_real_blocks_total"),
        pods=int(total("kvatlas_scorer_pods")),
        unserved=int(total("kvatlas_scorer_uncovered_partitions")),
        disagreements=sorted(
            f"{sample.labels['subject']}: {sample.labels['finding']}"
            for sample in found
            if sample.name == "kvatlas_scorer_disagreements"
        ),
    )


def row_of(scorer: str, sample: Sample, before: Sample | None) -> ScorerRow:
    """Return what is shown; rates are against the sample before, unless the scorer has started anew since."""
    if before is not None and (before.requests > sample.requests or before.moment >= sample.moment):
        before = None
    new = dict(sample.buckets)
    rate = 0.0
    if before is not None:
        rate = (sample.requests - before.requests) / (sample.moment - before.moment)
        if sample.requests > before.requests:
            new = {bound: value - before.buckets.get(bound, 0.0) for bound, value in sample.buckets.items()}
    known = sum(value for outcome, value in sample.outcomes.items() if outcome not in _NO_VERDICT)
    return ScorerRow(
        scorer=scorer,
        up=True,
        requests_per_second=round(rate, 1),
        p50_ms=_quantile_ms(new, 0.5),
        p99_ms=_quantile_ms(new, 0.99),
        errors=round(sample.failed / sample.requests, 4) if sample.requests else 0.0,
        hit_ratio=round(sample.outcomes.get("hit", 0.0) / known, 4) if known else None,
        realised=round(sample.real / sample.predicted, 4) if sample.predicted else None,
        pods=sample.pods,
        unserved=sample.unserved,
        disagreements=sample.disagreements,
    )


def _quantile_ms(buckets: Mapping[float, float], share: float) -> float | None:
    """Interpolate in cumulative buckets as Prometheus does; None without observations."""
    bounds = sorted(buckets)
    total = buckets.get(_ALL, 0.0)
    if not total:
        return None
    rank, below, lower = share * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if bound == _ALL:
                return round(lower * 1000, 3)
            inside = buckets[bound] - below
            return round((lower + (bound - lower) * ((rank - below) / inside if inside else 1.0)) * 1000, 3)
        below, lower = buckets[bound], bound
    return None


class Scorers:
    """Asks scorers for their metrics.

    Args:
        addresses: HOST:PORT of their telemetry; a name with several addresses is as many scorers, so that the name of
            a headless service stands for all of them.

    Raises:
        SettingsError: an address is not HOST:PORT.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._places = [_place(address) for address in addresses]
        self._before: dict[str, Sample] = {}

    async def look(self) -> list[ScorerRow]:
        """Return a row for each scorer, in order of their addresses."""
        if not self._places:
            return []
        found = sorted({place for places in await asyncio.gather(*map(_resolved, self._places)) for place in places})
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            return list(await asyncio.gather(*(self._row(session, place) for place in found)))

    async def _row(self, session: aiohttp.ClientSession, place: str) -> ScorerRow:
        try:
            async with session.get(f"http://{place}/metrics") as answer:
                answer.raise_for_status()
                sample = read_page(await answer.text(), time.monotonic())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError):
            self._before.pop(place, None)
            return ScorerRow(scorer=place, up=False)
        before = self._before.get(place)
        self._before[place] = sample
        return row_of(place, sample, before)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    if not host or (number := port_of(port)) is None:
        raise SettingsError(f"--scorer-metrics {address!r} is not HOST:PORT, the scorer's telemetry_listen")
    return host.strip("[]"), number


async def _resolved(place: tuple[str, int]) -> Iterable[str]:
    host, port = place
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return [f"{host}:{port}"]  # nobody behind the name now: shown as down
    addresses = {str(info[4][0]) for info in infos}
    if len(addresses) == 1 or "127.0.0.1" in addresses:
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]
