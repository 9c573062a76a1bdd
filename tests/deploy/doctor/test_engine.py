"""Every misconfiguration of an engine is named, and only that one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.engines.facts import EngineFacts, EventSource
from kvatlas.deploy.doctor.engine import EngineSeen, SourceSeen, judge, look
from kvatlas.deploy.doctor.findings import CHECKS, exit_code, page
from tests.bridge.engines.fake_engine import fake_engine, vllm

STORED = {
    "type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": list(range(16)),
    "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None,
}  # fmt: skip
CLOSED = "tcp://127.0.0.1:1"


@pytest.fixture
def publisher() -> Iterator[EnginePublisher]:
    """An engine's sockets on ports of their own."""
    made = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@pod-a@m")
    made.start()
    yield made
    made.close()


async def seen_of(answers: dict[str, Any], publisher: EnginePublisher, *events: Any) -> EngineSeen:
    """Look at a fake engine while it publishes; waits until all of that has been heard where it can be."""
    with fake_engine(answers) as url:
        async with look(url, timeout_seconds=1.0) as seen:
            heard = [source for source in seen.sources if source.connected]
            async with asyncio.timeout(20):
                while heard and len(heard[0].sequences) < 2 * len(events or (STORED,)):
                    for event in events or (STORED,):
                        publisher.publish([event], timestamp=time.time())
                    await asyncio.sleep(0.05)
        return seen


def answers_of(publisher: EnginePublisher, **changes: Any) -> dict[str, Any]:
    """Return what a vLLM with these sockets tells, changed."""
    return vllm(publisher.endpoint, publisher.replay_endpoint) | changes


def wrong(seen: EngineSeen, size: int = 16) -> set[tuple[str, str]]:
    """Return the checks that are not in order."""
    return {(finding.check, finding.state) for finding in judge(seen, size) if finding.state in ("warn", "fail")}


async def test_an_engine_in_order_has_nothing_to_fix(publisher: EnginePublisher) -> None:
    """All sockets answer, the sequence grows without holes, the clock is ours."""
    publisher.publish([STORED], timestamp=time.time())
    seen = await seen_of(answers_of(publisher), publisher)
    assert wrong(seen) == set()
    states = {finding.check: finding.state for finding in judge(seen, 16)}
    assert states["replay-answers"] == states["sequence"] == states["readable"] == states["clock"] == "ok"
    assert exit_code(judge(seen, 16)) == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"/kv_event_sources": {}}, ("events", "fail")),
        ({"live": CLOSED}, ("live", "fail")),
        ({"replay": None}, ("replay", "warn")),
        ({"replay": CLOSED}, ("replay-answers", "fail")),
        ({"topic": "kv-events"}, ("topic", "warn")),
        ({"caching": "False"}, ("prefix-caching", "fail")),
        ({"block": "24"}, ("block-size", "fail")),
    ],
)
async def test_one_misconfiguration_is_named_alone(
    publisher: EnginePublisher, change: dict[str, Any], expected: tuple[str, str]
) -> None:
    """Each with the fix in the page."""
    answers = answers_of(publisher)
    source = answers["/kv_event_sources"]["0"]
    source["endpoint"] = change.pop("live", source["endpoint"])
    source["replay_endpoint"] = change.pop("replay", source["replay_endpoint"])
    source["topic"] = change.pop("topic", source["topic"])
    caching, block = change.pop("caching", "True"), change.pop("block", "16")
    metrics = answers["/metrics"].replace('caching="True"', f'caching="{caching}"')
    answers["/metrics"] = metrics.replace('block_size="16"', f'block_size="{block}"', 1)
    seen = await seen_of(answers | change, publisher)
    assert wrong(seen) == {expected}
    assert CHECKS[expected[0]].fix in page(judge(seen, 16))


async def test_events_that_cannot_be_read_are_said(publisher: EnginePublisher) -> None:
    """With the reason of the first."""
    seen = await seen_of(answers_of(publisher), publisher, {**STORED, "token_ids": "text"}, STORED)
    assert wrong(seen) == {("readable", "fail")}


async def test_an_offload_tier_without_tokens_is_said(publisher: EnginePublisher) -> None:
    """Placeholders are of use only for blocks that are known from the GPU."""
    bare = {**STORED, "medium": "CPU", "token_ids": [], "block_size": 0}
    seen = await seen_of(answers_of(publisher), publisher, bare, STORED)
    assert wrong(seen) == {("offload", "warn")}


async def test_nobody_there_is_one_finding() -> None:
    """The address is named; nothing else is guessed."""
    async with look("http://127.0.0.1:1", timeout_seconds=1.0) as seen:
        pass
    assert wrong(seen) == {("api", "fail")}
    assert exit_code(judge(seen)) == 1


def seen_with(**changes: Any) -> EngineSeen:
    """Return what is seen of an engine in order, changed."""
    source = EventSource(rank=0, live="tcp://h:1", replay="tcp://h:2", topic="kv@p@m")
    facts = {"url": "http://h:8", "engine": "vllm", "version": "0.33.0", "models": ("m",), "sources": (source,)}
    facts |= {"block_size_tokens": 16, "prefix_caching": True} | changes.pop("facts", {})
    one = SourceSeen(source, connected=True, replayed=3, sequences=[4, 5, 6], clock_seconds=0.1)
    for name, value in changes.items():
        setattr(one, name, value)
    return EngineSeen("http://h:8", EngineFacts(**facts), sources=[one])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"sequences": [4, 7]}, {("sequence", "fail")}),
        ({"clock_seconds": -30.0}, {("clock", "warn")}),
        ({"facts": {"engine": "sglang", "version": "0.5.17"}}, {("names", "warn")}),
        ({"facts": {"engine": "sglang", "version": "0.5.22"}}, {("names", "warn")}),
        ({"facts": {"engine": "sglang", "version": "0.5.23"}}, set()),
        ({"facts": {"prefix_caching": None, "block_size_tokens": None}}, set()),
    ],
)
def test_what_was_seen_is_judged(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    """What cannot be looked at is no finding of harm."""
    assert wrong(seen_with(**changes)) == expected


def test_a_message_is_noted_with_its_clock() -> None:
    """Clock against ours, in seconds."""
    seen = SourceSeen(EventSource(rank=0, live="tcp://h:1"))
    seen.heard(0, b"\xc1", "vllm", time.time())
    assert len(seen.unreadable) == 1
    assert seen.clock_seconds is None
