"""Two pickers on one Kafka: what one gives out counts at the other, and the end that one sees ends it at both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import REGISTRY

from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.processes.picking import ScorerWithPicker
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.picker.route import Destination, Incoming
from kvatlas.scorer.tokenization.options import TokenizerSettings

ADDRESSES = ["10.0.0.1:8000", "10.0.0.2:8000"]
PROMPT = {"model": "m", "prompt": "word " * 4_000}


@pytest.fixture
async def pair(brokers: str, topic_prefix: str) -> AsyncIterator[list[ScorerWithPicker]]:
    """Pickers A and B, each with a scorer that follows decisions; no worker runs, so that load alone decides."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=2)
    await ensure_topics(kafka, TOPICS)
    made = [
        ScorerWithPicker(
            PickerSettings(
                name=name,
                listen="127.0.0.1:0",
                endpoints=[f"{one},model=m" for one in ADDRESSES],
                scrape_seconds=0.0,
                drain_seconds=0.0,
            ),
            kafka,
            ScorerSettings(name=name),
            TokenizerSettings(),
        )
        for name in ("A", "B")
    ]
    for one in made:
        await one.start()
    yield made
    for one in made:
        await one.stop()


async def until(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(90):
        while not true():
            await asyncio.sleep(0.005)


async def picked(one: ScorerWithPicker, request_id: str) -> str:
    """Let a picker decide a request; returns the address."""
    incoming = Incoming({":path": "/v1/completions"}, json.dumps(PROMPT).encode(), None, request_id)
    decision = await one.picker.decider.decide(incoming)
    assert isinstance(decision, Destination)
    return decision.addresses[0]


async def hears(one: ScorerWithPicker, other: ScorerWithPicker) -> None:
    """Wait until a picker follows what another one decides."""
    async with asyncio.timeout(90):
        for number in itertools.count():
            probe = f"probe-{id(other)}-{number}"
            await picked(other, probe)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while not one.picker.state.loads.address_of(probe):
                        await asyncio.sleep(0.01)
                    return


async def test_what_one_picker_gives_out_counts_at_the_other_until_anybody_sees_its_end(
    pair: list[ScorerWithPicker],
) -> None:
    """A response that the other picker sees ends the request at both; a picker that stops takes nothing with it."""
    first, second = pair
    await hears(second, first)
    await hears(first, second)
    loads = second.picker.state.loads
    before = {address: loads.open_requests(address) for address in ADDRESSES}
    measured = sharing("count")
    address = await picked(first, "r")
    await until(lambda: loads.address_of("r") == address)
    assert loads.open_requests(address) == before[address] + 1
    assert sharing("count") > measured
    assert sharing("sum") > 0

    # Envoy shows a response to any of them: the one that did not decide says whether it was right.
    watch = second.picker.decider.exchange("r")
    watch.headers(200, "application/json", address)
    usage = {"prompt_tokens": 4_000, "prompt_tokens_details": {"cached_tokens": 0}}
    watch.chunk(json.dumps({"usage": usage}).encode())
    watch.ended(complete=True)
    assert loads.address_of("r") == ""
    await until(lambda: first.picker.state.loads.address_of("r") == "")

    left = await picked(first, "left")
    await until(lambda: loads.address_of("left") == left)
    await first.stop()
    assert await picked(second, "after") in ADDRESSES
    assert loads.address_of("left") == left


def sharing(name: str) -> float:
    """What was measured of the way from one picker to another in this process."""
    return REGISTRY.get_sample_value(f"kvatlas_picker_sharing_seconds_{name}") or 0.0
