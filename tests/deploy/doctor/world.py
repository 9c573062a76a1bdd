"""A system in order for the doctor to look at, of which tests break one thing: engine, log, scorer, picker."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.deploy.doctor.engine import EngineSeen, look
from kvatlas.deploy.doctor.examine import Examined
from kvatlas.deploy.doctor.log import LogSeen
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.bridge.engines.fake_engine import fake_engine, vllm

BLOCK = 16
PARTITIONS = 4
CLOSED = "tcp://127.0.0.1:1"


def worker(name: str, partitions: list[int], **changes: Any) -> bytes:
    """Return the announcement of a worker."""
    record = {
        "worker": name, "endpoint": f"{name}:1", "partitions": partitions, "partition_count": PARTITIONS,
        "block_size_tokens": BLOCK, "key_version": 1, "updated_ns": time.time_ns(),
        "expires_ns": time.time_ns() + 86_400 * 10**9,
    }  # fmt: skip
    return records.encode(records.WorkerRecord(**record | changes))


class World:
    """Everything that a doctor sees; each attribute may be changed before it looks.

    Attributes:
        answers: of the engine's API, by path.
        usage: whether the engine tells cached tokens.
        recomputed: tokens that it computes although they are cached.
        short: tokens that the scorer finds less than there are.
        names: model names under which the scorer finds it.
        mine: the scorer's tokens of a text and of a chat.
        pod: what the scorer says of the engine's pod; None for nothing.
        refused: what the scorer answers instead of anything.
        partial: whether a partition does not answer the scorer.
        said: events that the engine publishes with each prompt that it computes.
        holes: whether it leaves out a sequence before each message.
        clock: seconds that the engine's clock is ahead.
        urls: of further engines.
        wait_seconds, connect_seconds: patience of the doctor.
        log, picker: what there is to see of the log, and on the picker's page.
    """

    def __init__(self, publisher: EnginePublisher) -> None:
        self.publisher = publisher
        self.answers = vllm(publisher.endpoint, publisher.replay_endpoint) | {
            "/tokenize": lambda body: {"tokens": tokens_of(asked(body))},
            "/v1/completions": self._complete,
        }
        self.usage, self.recomputed, self.short, self.names = True, 0, 0, {"m", "alias"}
        self.mine = tokens_of, tokens_of
        self.pod: dict[str, Any] | None = {
            "pod": "pod-a", "state": "live", "model": "m", "endpoint": publisher.endpoint
        }  # fmt: skip
        self.refused, self.partial = "", False
        self.said, self.holes = [stored()], False
        self.clock = 0.0
        self.urls: list[str] = []
        self.wait_seconds, self.connect_seconds = 60.0, 60.0
        self.picker = (
            'kvatlas_picker_endpoints{state="ready"} 2.0\nkvatlas_picker_endpoints{state="unready"} 0.0\n'
            "kvatlas_picker_stale_endpoints 0.0\n"
        )
        table = WorkerDirectory(time.time_ns)
        table.apply(b"w", worker("w", list(range(PARTITIONS))))
        declared = (*topics.TOPICS, *topics.changelog_topics("kvatlas"))
        self.log = LogSeen("k:1", PARTITIONS, wanted={topic.name: topic for topic in declared}, workers=table)
        self.log.configs = {
            topic.name: {"retention.ms": str(topic.retention_hours * 3_600_000)} for topic in declared
        } | {topics.PODS: {"retention.bytes": "-1"}}
        self._computed: set[str] = set()
        self._seen: list[EngineSeen] = []

    @property
    def source(self) -> dict[str, Any]:
        """What the engine tells of its rank."""
        found: dict[str, Any] = self.answers["/kv_event_sources"]["0"]
        return found

    def metrics(self, old: str, new: str) -> None:
        """Change the engine's page of metrics."""
        assert old in self.answers["/metrics"]
        self.answers["/metrics"] = self.answers["/metrics"].replace(old, new, 1)

    def become_sglang(self, version: str = "0.5.23", *, pages: int = BLOCK, **info: Any) -> None:
        """Answer as SGLang does."""
        live, replay = (int(str(address).rpartition(":")[2]) for address in self._addresses())
        events = {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": live, "topic": "kv@pod-a@m"}
        events |= {"replay_endpoint_port_base": replay, "block_size": pages, "dp_size": 1}
        told = {"kv_events": events, "page_size": pages, "version": version, "disable_radix_cache": False} | info
        for path in ("/kv_event_sources", "/version"):
            del self.answers[path]
        self.answers |= {"/server_info": told, "/metrics": "sglang:num_running_reqs 0.0\n"}

    def _addresses(self) -> tuple[str, str | None]:
        return self.publisher.endpoint, self.publisher.replay_endpoint

    @contextmanager
    def examined(self) -> Iterator[Examined]:
        """Serve engine and picker, and give what a doctor is told to look at."""
        with fake_engine(self.answers) as url, fake_engine({"/metrics": self.picker}) as picker:

            async def log() -> LogSeen:
                return self.log

            yield Examined(
                urls=[url, *self.urls],
                client=cast("ScorerClient", self),
                scorer="s:1",
                log=log,
                picker=picker.partition("://")[2],
                wait_seconds=self.wait_seconds,
                connect_seconds=self.connect_seconds,
                look=self._look,
            )

    # --- the engine ------------------------------------------------------------------------------------------------

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        text, count = body["prompt"], len(tokens_of(body["prompt"]))
        cached = usable(count) - self.recomputed if text in self._computed else 0
        self._computed.add(text)
        self._publish()
        details = {"cached_tokens": cached} if self.usage else None
        return {"usage": {"prompt_tokens": count, "prompt_tokens_details": details}}

    def _publish(self) -> None:
        if self.said:
            if self.holes:
                self.publisher.skip()
            self.publisher.publish(self.said, timestamp=time.time() + self.clock)

    @asynccontextmanager
    async def _look(self, url: str, timeout_seconds: float) -> AsyncIterator[EngineSeen]:
        async with look(url, timeout_seconds) as seen:
            self._seen.append(seen)
            yield seen

    def _heard(self) -> bool:
        sources = [source for seen in self._seen for source in seen.sources if source.connected]
        return not self.said or all(len(source.sequences) > 1 for source in sources)

    # --- the scorer, as its client shows it ------------------------------------------------------------------------

    def score(self, model: str, *, prompt: str = "", tokens: Any = (), usable_only: bool = False) -> pb.ScoreResponse:
        """Answer from what the engine has computed."""
        self._may_answer()
        answer = pb.ScoreResponse(block_size_tokens=BLOCK)
        answer.freshness.partial = self.partial
        if prompt in self._computed and model in self.names:
            answer.scores["pod-a"].matched_tokens = usable(len(tokens_of(prompt))) - self.short
        return answer

    def call(self, name: str, request: pb.ScoreRequest) -> pb.TokenizeResponse:
        """Tokenize."""
        self._may_answer()
        assert name == "Tokenize"
        chat = "".join(message.content for message in request.chat.messages)
        ids = self.mine[1](chat) if chat else self.mine[0](request.prompt)
        return pb.TokenizeResponse(prompts=[pb.Tokenized(tokens=ids)])

    def list_pods(self) -> list[pb.PodInfo]:
        """Return the one pod, once the doctor has heard as much of the engine as it needs: it is asked last."""
        self._may_answer()
        until = time.monotonic() + 90
        while not self._heard():
            assert time.monotonic() < until, "the engine is not heard"
            self._publish()
            time.sleep(0.02)
        return [pb.PodInfo(**self.pod)] if self.pod else []

    def _may_answer(self) -> None:
        if self.refused:
            raise ClientError("UNAVAILABLE", self.refused)


def stored(**changes: Any) -> dict[str, Any]:
    """Return a store of one block on the GPU, changed."""
    return {
        "type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": list(range(BLOCK)),
        "block_size": BLOCK, "lora_id": None, "medium": "GPU", "lora_name": None,
    } | changes  # fmt: skip


def tokens_of(text: str) -> list[int]:
    """Return the engine's tokens of a text."""
    return list(text.encode())


def asked(body: dict[str, Any]) -> str:
    """Return the text of a request to the tokenizer."""
    return body.get("prompt") or "".join(message["content"] for message in body["messages"])


def usable(count: int) -> int:
    """Return how many tokens of a prompt an engine can reuse."""
    return (count - 1) // BLOCK * BLOCK
