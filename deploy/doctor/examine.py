"""The whole examination: engines, then the log, the probe, and those who answer, in the order in which it is fair."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final

import msgspec

from kvatlas.deploy.doctor.engine import EngineSeen, look
from kvatlas.deploy.doctor.engine_checks import judge
from kvatlas.deploy.doctor.findings import Finding, by_subject, without_echoes
from kvatlas.deploy.doctor.log import LogSeen, judge_log
from kvatlas.deploy.doctor.probe import check_probe
from kvatlas.deploy.doctor.system import block_size, check_picker, check_scorer
from kvatlas.scorer.client import ScorerClient

_QUIET_SECONDS: Final = 1.0


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What is examined.

    Attributes:
        urls: of the engines' APIs.
        client: the scorer; None looks at the engines alone.
        scorer: its address, as it is told.
        log: looks at the log; None leaves it out.
        picker: host:port of a picker's metrics, empty for none.
        probe: whether to send requests through the engines.
        wait_seconds: how long an event may be under way.
        connect_seconds: how long an engine's API and sockets may take to answer.
        told: gets what is done now, for people who wait.
        look: how an engine is looked at: by its URL, and how long it may take to answer.
    """

    urls: Sequence[str]
    client: ScorerClient | None = None
    scorer: str = ""
    log: Callable[[], Awaitable[LogSeen]] | None = None
    picker: str = ""
    probe: bool = True
    wait_seconds: float = 10.0
    connect_seconds: float = 3.0
    told: Callable[[str], object] = lambda _text: None
    look: Callable[[str, float], AbstractAsyncContextManager[EngineSeen]] = look


async def examine(what: Examined) -> list[Finding]:
    """Return the findings, those of one subject together."""
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        engines = await asyncio.gather(
            *(stack.enter_async_context(what.look(url, what.connect_seconds)) for url in what.urls)
        )
        client = what.client
        if client is None:
            await _settle(engines, what.wait_seconds)
            return [finding for seen in engines for finding in judge(seen)]
        if what.log is not None:
            findings += judge_log(await what.log())
        size = await block_size(client, engines)
        probes = [await _probe(what, seen, size, client) for seen in engines] if what.probe else []
        await _settle(engines, what.wait_seconds)
        # Last: an engine that had nothing to say before the probe is known to the scorer only now.
        findings += await check_scorer(client, what.scorer, engines)
        if what.picker:
            findings += await check_picker(what.picker)
        for seen in engines:
            findings += judge(seen, size)
        findings += [finding for probe in probes for finding in probe]
    return by_subject(without_echoes(findings))


async def _probe(what: Examined, seen: EngineSeen, size: int | None, client: ScorerClient) -> list[Finding]:
    if seen.facts is None or not seen.facts.models or size is None:
        return [Finding("probe", seen.url, "skip", "no model, or no scorer to predict with")]
    what.told(f"probing {seen.url} ...")
    return await check_probe(seen, size, client, wait_seconds=what.wait_seconds)


async def _settle(engines: Sequence[EngineSeen], wait_seconds: float) -> None:
    """Give sockets that have just connected a moment to hear something; an engine that was probed must speak."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_seconds if any(seen.probed for seen in engines) else _QUIET_SECONDS):
            while any(_silent(seen) for seen in engines):  # noqa: ASYNC110 - sockets fill it
                await asyncio.sleep(0.05)


def _silent(seen: EngineSeen) -> bool:
    heard = [source.sequences for source in seen.sources if source.connected]
    return bool(heard) and not any(heard)
