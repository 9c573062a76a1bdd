"""Two pickers on one Kafka: what one gives out counts at the other, and the end that one sees ends it at both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.pod_ids import pod_partition
from kvatlas.bridge.model.sessions import session_hash
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.story import find
from kvatlas.deploy.processes.picking import ScorerWithPicker
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.picker.route import Destination, Incoming
from kvatlas.scorer.picker.verdict import Prediction
from kvatlas.scorer.tokenization.options import TokenizerSettings
from tests.integration.log_support import read_topic
from tests.integration.scorer_support import ScoringFleet
from tests.integration.streams_support import WorkerProcess, make_topics, producing
from tests.waiting import until

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


def degraded() -> float:
    """Requests decided without a whole index, whatever was missing."""
    samples = [sample for family in metrics.DEGRADED.collect() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


class Site:
    """One worker process, and a picker in this process that is asked for one prompt over and over."""

    def __init__(self, kafka: KafkaSettings, folder: Path, workers: list[WorkerProcess]) -> None:
        self.fleet = ScoringFleet(kafka, pods=2, lora_share=0.0, salted_share=0.0)
        endpoints = [
            f"10.0.0.{number}:8000,pod={name},model={self.fleet.model}" for number, name in enumerate(self.fleet.pods)
        ]
        settings = PickerSettings(
            name="A", listen="127.0.0.1:0", endpoints=endpoints, scrape_seconds=0.0, drain_seconds=0.0
        )
        self.one = ScorerWithPicker(settings, kafka, ScorerSettings(name="A"), TokenizerSettings())
        self._kafka, self._folder, self._workers = kafka, folder, workers
        self._requests = itertools.count()

    async def start_worker(self) -> None:
        self._workers.append(WorkerProcess(self._kafka, self._folder / "w"))
        await self._workers[-1].ready()

    async def predicted(self) -> Prediction:
        """Let a request for the prompt be decided; returns what was predicted."""
        name = f"r{next(self._requests)}"
        body = json.dumps({"model": self.fleet.model, "prompt": self.fleet.prompts[-1].tokens}).encode()
        decision = await self.one.picker.decider.decide(Incoming({":path": "/v1/completions"}, body, None, name))
        assert isinstance(decision, Destination)
        assert decision.addresses
        made = self.one.picker.state.close(name)
        assert made is not None
        return made.prediction

    async def until(self, true: Callable[[Prediction], bool]) -> None:
        """Ask until a prediction is so."""
        async with asyncio.timeout(240):
            while not true(await self.predicted()):
                await asyncio.sleep(0.1)


def known(made: Prediction) -> bool:
    """Whether a prediction is by what events have shown."""
    return made.cached_tokens > made.speculative_tokens and not made.degraded and not made.partial


async def test_a_killed_worker_and_a_restarted_engine_cost_predictions_and_no_request(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """Every request is decided; what is predicted is what the index can vouch for at that moment, and says so."""
    kafka = await make_topics(brokers, topic_prefix)
    site = Site(kafka, tmp_path, workers)
    fleet = site.fleet
    await site.start_worker()
    await site.one.start()
    try:
        async with producing(kafka) as producer:
            await fleet.serve(producer, 20)
            await site.until(known)
            before = degraded()
            workers[0].kill()
            await site.until(lambda made: bool(made.partial or made.degraded))
            assert degraded() > before
            await site.start_worker()
            await site.until(known)
            prompt = fleet.prompts[-1]
            while fleet.expected(prompt):
                fleet.disturb(0.0, 1.0)
            for _ in fleet.pods:  # a new process is known by its first message
                await fleet.serve(producer, 4)
            fleet.prompts.append(prompt)
            expected = fleet.expected(prompt)
            most = max((tokens for _, tokens, _ in expected.values()), default=0)
            await site.until(lambda made: made.cached_tokens - made.speculative_tokens <= most)
    finally:
        await site.one.stop()


@pytest.mark.timeout(900)
async def test_kafka_that_goes_away_leaves_load_alone_until_it_is_back(
    own_kafka: KafkaNode, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """The worker still answers, but cannot know any more what pods hold: that is said, and no request waits for it."""
    kafka = await make_topics(own_kafka.bootstrap, "away-")
    site = Site(kafka, tmp_path, workers)
    await site.start_worker()
    await site.one.start()
    try:
        async with producing(kafka) as producer:
            await site.fleet.serve(producer, 20)
            await site.until(known)
        without_index = metrics.DEGRADED.labels("index")._value.get()
        await asyncio.to_thread(own_kafka.stop)
        await site.until(lambda made: made.degraded == "index")
        assert metrics.DEGRADED.labels("index")._value.get() > without_index
        assert (await site.predicted()).cached_tokens == 0
        await asyncio.to_thread(own_kafka.start)
        await site.until(known)
    finally:
        await site.one.stop()


CAPTURES = Path(__file__).parents[1] / "data" / "captures"


def recorded(name: str, case: str) -> bytes:
    """A message made by an engine's own encoder; its session is ``agent-7``."""
    found = json.loads((CAPTURES / name).read_text())[case]
    assert found["json"][1][0]["session_id"] == "agent-7"
    return bytes.fromhex(found["hex"])


async def test_a_session_that_came_by_another_way_is_known_by_its_pods_own_events(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """No picker has sent it anywhere; the engines' events name it, by a hash, and the newest place counts."""
    kafka = await make_topics(brokers, topic_prefix)
    workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[0].ready()
    endpoints = [f"{address},pod={pod},model=m" for address, pod in zip(ADDRESSES, "ab", strict=True)]
    settings = PickerSettings(name="A", listen="127.0.0.1:0", endpoints=endpoints, scrape_seconds=0, drain_seconds=0)
    one = ScorerWithPicker(settings, kafka, ScorerSettings(name="A"), TokenizerSettings())
    await one.start()
    state, routed = one.picker.state, metrics.DECISIONS.labels("routed", "session")._value
    incoming = Incoming({":path": "/v1/completions", "x-session-id": "agent-7"}, b"{}", None, "r")
    try:
        async with asyncio.timeout(90), producing(kafka) as producer:
            await one._inner._decided.caught_up.wait()
            await producer.send_and_wait(kafka.topic(topics.DECISIONS), b"\xc1 no record", key=b"a")
            for engine, pod, address, value in (
                ("vllm", "a", ADDRESSES[0], recorded("golden_vllm_offload.json", "selfdesc_session.0")),
                ("sglang", "b", ADDRESSES[1], recorded("golden_sglang.json", "0.5.23/store_session")),
            ):
                fields = {
                    topics.H_SEQUENCE: 0,
                    topics.H_INCARNATION: 1,
                    topics.H_RECEIVE_NS: time.time_ns(),
                    topics.H_ENGINE: engine,
                    topics.H_MODEL: "m",
                }
                await producer.send_and_wait(
                    kafka.topic(topics.EVENTS),
                    value,
                    key=pod.encode(),
                    headers=[(name, str(field).encode()) for name, field in fields.items()],
                    partition=pod_partition(pod, kafka.partitions),
                )
                while state.sessions.get([session_hash("agent-7")], time.monotonic()) != address:
                    await asyncio.sleep(0.01)
                before = routed.get()
                decision = await one.picker.decider.decide(incoming)
                assert isinstance(decision, Destination)
                assert decision.addresses[0] == address
                assert routed.get() == before + 1
                state.close("r")
    finally:
        await one.stop()
    values = [record.value for record in await read_topic(brokers, kafka.topic(topics.DECISIONS), kafka.partitions)]
    assert sum(b"sessions" in value for value in values) >= 2
    assert not any(b"agent-7" in value for value in values)
    async with LogReader(kafka) as reader:
        with pytest.raises(KvatlasError, match="no decision about request 'a'"):
            await find(reader, "a")


def sharing(name: str) -> float:
    """What was measured of the way from one picker to another in this process."""
    return REGISTRY.get_sample_value(f"kvatlas_picker_sharing_seconds_{name}") or 0.0
