"""One deployment behind one small interface: the library over each of its backends, and the whole pipeline.

A test sends ``kv-events`` records of pods and asks for scores; what is between is the subject's.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, partition_of, root_key
from kvatlas.bridge.model.records import Control
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer import IndexerOptions
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.backends.mirror import MirrorBackend
from kvatlas.scorer.library.indexer import Indexer
from kvatlas.scorer.library.sync import SyncIndexer
from kvatlas.scorer.scoring.walk import Weights
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.resolve.resolver import ResolveOptions
from tests.engine_events import stored
from tests.integration.pipeline_support import Service
from tests.integration.streams_support import PARTITIONS, WorkerProcess, make_topics, producing

Record = tuple[bytes, bytes, list[tuple[str, bytes]]]
#: Identifier, offset and length in tokens.
Item = tuple[str, int, int]
#: A model whose host memory counts half, in every subject.
HALF = "half"
_names = itertools.count()


class Found(NamedTuple):
    """A pod's score, as far as the cases speak of it."""

    score: float
    blocks: int
    suspect: int


class Options(NamedTuple):
    """What a deployment is made with."""

    block_size: int = 16
    strict_gaps: bool = False


class Subject(Protocol):
    """What is tested.

    Attributes:
        read_only: it only reads what others write.
    """

    read_only: bool

    def send(self, batch: Sequence[Record]) -> None:
        """Bring records onto the log, or what stands for it."""

    def score(self, tokens: Sequence[int], model: str, **options: Any) -> dict[str, Found]:
        """Score a prompt."""

    def holders(self, tokens: Sequence[int], model: str) -> list[set[tuple[str, str, int]]]:
        """Return (pod, tier, group) of what holds each block and counts."""

    def sequences(self) -> dict[str, int]:
        """Return the last sequence applied of each pod."""

    def multimodal(self, items: Sequence[Item]) -> list[Any]:
        """Return items of a prompt as :meth:`score` takes them."""

    def decide(self, pod: str, tokens: Sequence[int], model: str) -> Callable[[], None]:
        """Predict that a pod will hold a prompt, because it was sent there; returns what ends the prediction."""


class Library:
    """The indexer library; records go straight in."""

    read_only = False

    def __init__(self, make: Callable[[], Indexer]) -> None:
        self._indexer = SyncIndexer(make)
        self._indexer.start()

    def send(self, batch: Sequence[Record]) -> None:
        for key, value, headers in batch:
            self._indexer.apply_record(key, value, headers)

    def score(self, tokens: Sequence[int], model: str, **options: Any) -> dict[str, Found]:
        deadline = time.monotonic() + 90
        while (scored := self._indexer.score_tokens(tokens, model, **options)).partial:
            assert self.read_only  # a mirror says so while a partition is copied
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return {pod: Found(s.score, s.matched_blocks, s.suspect_blocks) for pod, s in scored.scores.items()}

    def holders(self, tokens: Sequence[int], model: str) -> list[set[tuple[str, str, int]]]:
        return [_counting(block.holders) for block in self._indexer.explain(tokens, model).blocks]

    def sequences(self) -> dict[str, int]:
        return {pod.pod: pod.last_sequence for pod in self._indexer.pods()}

    def multimodal(self, items: Sequence[Item]) -> list[Any]:
        return list(items)

    def decide(self, pod: str, tokens: Sequence[int], model: str) -> Callable[[], None]:
        self._indexer.add_approximate(pod, model, 100)
        assert self._indexer.note_decision(pod, tokens, model)
        return lambda: self._indexer.remove_engine(pod)

    def close(self) -> None:
        self._indexer.stop()


class Pipeline:
    """Worker and scorer in processes of their own over a real Kafka; records go onto ``kv-events``."""

    read_only = False

    def __init__(self, brokers: str, prefix: str, folder: Path, options: Options, mirror: str) -> None:
        self.kafka: KafkaSettings = asyncio.run(make_topics(brokers, prefix))
        self.mirror = (mirror, prefix)
        flags = [f"--block-size-tokens={options.block_size}", *(["--strict-gaps"] if options.strict_gaps else [])]
        flags += [f"--mirror={mirror}", f"--mirror-prefix={prefix}"]
        self._worker = WorkerProcess(self.kafka, folder / "state", *flags)
        asyncio.run(self._worker.ready(180))
        self._scorer = Service(
            folder / "scorer.log",
            *("scorer", f"--brokers={brokers}", f"--topic-prefix={prefix}", "--listen=127.0.0.1:0"),
            *(f"--models={HALF}:cpu=0.5", f"--partitions={PARTITIONS}"),
        )
        self._client = ScorerClient(self._scorer.ready(180))

    def send(self, batch: Sequence[Record]) -> None:
        asyncio.run(self._send(batch))

    async def _send(self, batch: Sequence[Record]) -> None:
        async with producing(self.kafka) as producer:
            topic = self.kafka.topic(topics.EVENTS)
            for key, value, headers in batch:
                partition = pod_ids.pod_partition(key.decode(), PARTITIONS)
                await producer.send(topic, value, key=key, headers=headers, partition=partition)
            await producer.flush()

    def score(self, tokens: Sequence[int], model: str, **options: Any) -> dict[str, Found]:
        deadline = time.monotonic() + 90
        # A lookup that missed its deadline on a busy machine says so, and is asked again.
        while (answer := self._client.score(model, tokens=tokens, **options)).freshness.partial:
            assert time.monotonic() < deadline, answer.freshness
        return {pod: Found(s.score, s.matched_blocks, s.suspect_blocks) for pod, s in answer.scores.items()}

    def holders(self, tokens: Sequence[int], model: str) -> list[set[tuple[str, str, int]]]:
        answer = self._client.call("Explain", score_request(model, tokens=tokens))
        return [_counting(block.holders) for block in answer.blocks]

    def sequences(self) -> dict[str, int]:
        return {pod.pod: pod.last_sequence for pod in self._client.list_pods()}

    def multimodal(self, items: Sequence[Item]) -> list[Any]:
        return [pb.MultimodalItem(identifier=name, offset=offset, length=length) for name, offset, length in items]

    def decide(self, pod: str, tokens: Sequence[int], model: str) -> Callable[[], None]:
        request = score_request(model, tokens=tokens)

        def report(ttl_ms: int) -> Any:
            # The same request id again: the later word counts.
            return self._client.call(
                "ReportDecision",
                pb.ReportDecisionRequest(request_id=f"decision-{pod}", pod=pod, request=request, ttl_ms=ttl_ms),
            )

        assert report(60_000).blocks

        def end() -> None:
            deadline = time.monotonic() + 90
            # The scorer reads its own decisions on the log too: the first may come back after it was taken back.
            while any(score.speculative_blocks for score in self._client.score(model, tokens=tokens).scores.values()):
                assert time.monotonic() < deadline
                report(1)
                time.sleep(0.02)

        return end

    def close(self) -> None:
        self._client.close()
        self._scorer.close()
        self._worker.close()


class Follower(Library):
    """The library on what the pipeline writes: a replica of its log, or its mirror."""

    def __init__(self, pipeline: Pipeline, make: Callable[[], Indexer], *, read_only: bool) -> None:
        deadline = time.monotonic() + 90
        while True:
            try:
                super().__init__(make)
                break
            except BackendError:  # the mirror has not been begun yet
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.read_only = read_only
        self._pipeline = pipeline

    def send(self, batch: Sequence[Record]) -> None:
        self._pipeline.send(batch)


def follower(kind: str, pipeline: Pipeline, options: Options, model: str) -> Follower:
    """Return a subject of a kind, ``replica`` or ``mirror``."""
    chosen = library_options(options, model)
    if kind == "replica":
        return Follower(pipeline, lambda: Indexer.from_kafka(pipeline.kafka, options=chosen), read_only=False)
    return Follower(pipeline, lambda: Indexer.from_mirror(MirrorBackend(*pipeline.mirror), chosen), read_only=True)


def _counting(holders: Iterable[Any]) -> set[tuple[str, str, int]]:
    return {(found.pod, found.tier, found.group) for found in holders if found.state in ("live", "suspect")}


def library_options(options: Options, model: str) -> IndexerOptions:
    """Return the library's options of a deployment."""
    weights = Weights(cpu=0.5) if model == HALF else Weights()
    resolve = ResolveOptions(strict_gaps=options.strict_gaps)
    return IndexerOptions(block_size_tokens=options.block_size, weights=weights, resolve=resolve)


class World:
    """Pods of one test on a subject; their names are made unlike those of any other test."""

    def __init__(self, subject: Subject, options: Options, model: str = "") -> None:
        self.subject = subject
        self.size = options.block_size
        self._suffix = f"-{next(_names)}"
        self.model = model or f"model{self._suffix}"
        self._next: dict[str, int] = {}
        self._incarnation: dict[str, int] = {}
        self._marks: dict[str, list[int]] = {}

    # --- what pods say --------------------------------------------------------------------------------------------

    def send(self, pod: str, *events: Any, sequence: int | None = None, model: str = "") -> None:
        """Send one engine message."""
        self.raw(pod, msgspec.msgpack.encode((1000.5, list(events), None)), sequence=sequence, model=model)

    def raw(self, pod: str, payload: bytes, *, sequence: int | None = None, model: str = "") -> None:
        """Send one engine message of these bytes."""
        self.subject.send([self.record(pod, payload, sequence=sequence, model=model)])

    def record(self, pod: str, payload: bytes, *, sequence: int | None = None, model: str = "") -> Record:
        """Return the record of a message, the next in the pod's stream unless told otherwise."""
        number = self._next.get(pod, 0) if sequence is None else sequence
        self._next[pod] = max(number + 1, self._next.get(pod, 0))
        fields = {
            topics.H_SEQUENCE: number,
            topics.H_INCARNATION: self._incarnation.setdefault(pod, 1),
            topics.H_MODEL: model or self.model,
            topics.H_RECEIVE_NS: time.time_ns(),
        }
        return (pod + self._suffix).encode(), payload, [(name, str(value).encode()) for name, value in fields.items()]

    def control(self, pod: str, kind: str, lost: tuple[int, int] = (-1, -1)) -> None:
        """Send what the bridge learnt: ``gap`` or ``restart``."""
        incarnation = self._incarnation[pod] = self._incarnation.get(pod, 1) + 1
        self._next[pod] = lost[1] + 1 if kind == "gap" else 0
        value = records.encode(Control(type=kind, incarnation=incarnation, first_lost=lost[0], last_lost=lost[1]))
        headers = [(topics.H_CONTENT_TYPE, topics.CONTENT_CONTROL.encode())]
        self.subject.send([((pod + self._suffix).encode(), value, headers)])

    # --- what is asked --------------------------------------------------------------------------------------------

    def settle(self, *pods: str) -> None:
        """Wait until everything that pods have sent so far is in the index.

        Each sends a chain of blocks of its own, long enough for every partition: once it is there, so is what came
        before.
        """
        for pod in pods:
            tokens = self._mark()
            blocks = len(tokens) // self.size
            hashes = [1 << 40 | tokens[0] + number for number in range(blocks)]
            self.send(pod, stored(hashes, tokens, self.size))
            self._marks[pod] = tokens
        deadline = time.monotonic() + 120
        while not all(map(self._is_there, pods)):
            assert time.monotonic() < deadline, (pods, self.subject.sequences())
            time.sleep(0.02)

    def _mark(self) -> list[int]:
        tokens: list[int] = []
        touched: set[int] = set()
        start = 1_000_000 + next(_names) * 10_000
        while len(touched) < PARTITIONS:
            tokens = list(range(start, start + len(tokens) + self.size))
            keys = block_keys(root_key(self.model), pack_tokens(tokens), self.size)
            touched = {partition_of(key, PARTITIONS) for key in keys}
        return tokens

    def _is_there(self, pod: str) -> bool:
        name = pod + self._suffix
        if self.subject.sequences().get(name) != self._next[pod] - 1:
            return False
        return all((name, "gpu", 0) in block for block in self.subject.holders(self._marks[pod], self.model))

    def score(self, tokens: Sequence[int], *, pods: Sequence[str] = (), model: str = "") -> dict[str, float]:
        """Return pod -> score."""
        return {pod: round(found.score, 6) for pod, found in self.found(tokens, pods=pods, model=model).items()}

    def found(
        self, tokens: Sequence[int], *, pods: Sequence[str] = (), model: str = "", **options: Any
    ) -> dict[str, Found]:
        """Return pod -> what was found."""
        named = [pod + self._suffix for pod in pods]
        answer = self.subject.score(tokens, model or self.model, pods=named, **options)
        return {pod.removesuffix(self._suffix): found for pod, found in answer.items() if pod.endswith(self._suffix)}

    def decide(self, pod: str, tokens: Sequence[int]) -> Callable[[], None]:
        """Predict that a pod will hold a prompt; returns what ends the prediction."""
        return self.subject.decide(pod + self._suffix, tokens, self.model)

    def holders(self, tokens: Sequence[int], model: str = "") -> list[set[tuple[str, str, int]]]:
        """Return (pod, tier, group) of each block."""
        return [
            {(pod.removesuffix(self._suffix), tier, group) for pod, tier, group in block}
            for block in self.subject.holders(tokens, model or self.model)
        ]


def removed(*hashes: int | bytes, medium: str = "GPU", **more: Any) -> Mapping[str, Any]:
    """Return a BlockRemoved event."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, **more}


CLEARED: Mapping[str, Any] = {"type": "AllBlocksCleared"}
