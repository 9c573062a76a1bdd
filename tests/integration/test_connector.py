"""The connector's files in the index: paged blocks spill to disk, and the scores of the real pipeline say so."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.events import BlockMeta, StorageEvents
from kvatlas.connector.files.evictor import evict_root
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from kvatlas.connector.outcome import Outcome
from kvatlas.scorer.client import ScorerClient
from tests.connector.conftest import EIO, FaultyFileSystem, fail
from tests.integration import pipeline_support as support
from tests.integration.pipeline_support import Service

_MODEL = "kv-model"
_BLOCK = 16
_BLOCKS = 6
_TOKENS = list(range(1000, 1000 + _BLOCK * _BLOCKS))
_PATIENCE_SECONDS = 120.0


def _key(number: int) -> bytes:
    return (number + 1).to_bytes(32, "big") + bytes(4)


class Node:
    """A model node: an engine's stream, and a connector that announces its files on it."""

    def __init__(self, root: Path, pod: str, locality: Any, before: EnginePublisher | None = None) -> None:
        self.pod = pod
        # A node that comes back has the addresses of before.
        live, replay = (before.endpoint, before.replay_endpoint) if before else ("tcp://127.0.0.1:*",) * 2
        self.publisher = EnginePublisher(live, replay, topic=f"kv@{pod}@{_MODEL}")
        self.publisher.start()
        self.events = StorageEvents(self.publisher, locality=locality)
        self.events.start()
        fingerprint = Fingerprint(
            engine="test", engine_version="1", model=_MODEL, hash_algorithm="counter", hash_seed="", dtype="float32",
            block_size_tokens=(_BLOCK,), layers=(("layer",),),
        )  # fmt: skip
        self.fs = FaultyFileSystem()
        settings = FileTierSettings(root=root, threads=2, budget=DiskBudget(max_percent=None))
        self.files = FileTier(settings, fingerprint, fs=self.fs, listener=self.events)
        self.memory = [bytearray(random.Random(number).randbytes(8192)) for number in range(_BLOCKS)]

    @property
    def flag(self) -> str:
        """What ``--engines`` of the bridge takes."""
        return f"--engines={self.publisher.endpoint},{self.publisher.replay_endpoint}"

    def publish(self, *events: Mapping[str, Any]) -> None:
        """Publish events of the engine's own memory, after what the connector has to say."""
        self.events.flush()
        self.publisher.publish(events, timestamp=time.time())

    def compute(self) -> None:
        """Announce every block on the GPU."""
        self.publish({
            "type": "BlockStored", "block_hashes": list(range(1, _BLOCKS + 1)), "parent_block_hash": None,
            "token_ids": _TOKENS, "block_size": _BLOCK, "lora_id": None, "medium": "GPU", "lora_name": None,
        })  # fmt: skip

    def forget(self) -> None:
        """Announce that the GPU gave every block up."""
        self.publish({"type": "BlockRemoved", "block_hashes": list(range(1, _BLOCKS + 1)), "medium": "GPU"})

    def describe(self, number: int) -> None:
        """Tell what is known of a block."""
        tokens = tuple(_TOKENS[number * _BLOCK : (number + 1) * _BLOCK])
        self.events.describe({_key(number): BlockMeta(number + 1, number or None, tokens)})

    def store(self, *numbers: int) -> None:
        """Spill blocks to the files, as the engine does: what is known of each is told first."""
        for number in numbers:
            self.describe(number)
            result = self.files.store([self.block(number)]).result(90)[_key(number)]
            assert result.outcome is Outcome.STORED, result

    def block(self, number: int) -> BlockBuffers:
        """Return a block in the engine's memory."""
        return BlockBuffers(_key(number), [memoryview(self.memory[number])])

    def load(self, number: int) -> Outcome:
        """Bring one block back."""
        return self.files.load([self.block(number)]).result(90)[_key(number)].outcome

    def path(self, number: int) -> Path:
        """Return a block's file."""
        (found,) = self.files.directory.rglob(f"{_key(number).hex()}.kv")
        return found

    def close(self) -> None:
        """End the threads and close the sockets."""
        self.files.close()
        self.events.close()
        self.publisher.close()


class Stack:
    """Bridge, worker and scorer as processes."""

    def __init__(self, brokers: str, prefix: str, folder: Path) -> None:
        self._flags = (f"--brokers={brokers}", f"--topic-prefix={prefix}", "--partitions=2")
        self._folder = folder
        self._services: list[Service] = []

    def start(self, name: str, *flags: str) -> str:
        """Start a service and wait until it is ready; returns its address."""
        service = Service(self._folder / f"{name}.log", name, *self._flags, *flags)
        self._services.append(service)
        return service.ready()

    def logs(self) -> str:
        """What all services said."""
        return "".join(f"--- {service.log.name}\n{service.tail()[-2000:]}" for service in self._services)

    def close(self) -> None:
        """End what runs."""
        for service in self._services:
            service.close()


@pytest.fixture
def stack(brokers: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    """A worker and a scorer of this test alone; the bridge comes once there are engines."""
    made = Stack(brokers, topic_prefix, tmp_path)
    try:
        made.start("worker", f"--state-dir={tmp_path / 'state'}")
        yield made
    finally:
        made.close()


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Put each node here, to be closed at the end."""
    made: list[Node] = []
    yield made
    for node in made:
        node.close()


def _says(client: ScorerClient, pod: str, tiers: Mapping[str, int], stack: Stack) -> None:
    """Wait until the scorer says these matched blocks per tier of a pod, and no others."""

    def other() -> Any:
        scores = client.score(_MODEL, tokens=_TOKENS).scores
        found = dict(scores[pod].tiers) if pod in scores else {}
        return None if found == tiers else {"found": found}

    wrong = support.eventually(other, _PATIENCE_SECONDS, every=0.1)
    assert not wrong, (wrong, tiers, stack.logs())


@pytest.mark.parametrize(("locality", "tier", "weight"), [("LOCAL", "disk", 0.5), ("REMOTE", "shared", 0.4)])
def test_files_are_a_tier_of_the_pod_until_they_are_gone(
    stack: Stack, nodes: list[Node], tmp_path: Path, locality: str, tier: str, weight: float
) -> None:
    """Spilled blocks score as disk or shared, also those told before the bridge came, until evicted or damaged."""
    node = Node(tmp_path / "root", "pod-k", locality)
    nodes.append(node)
    node.compute()
    node.store(0, 1)  # nobody listens yet: these come from the replay socket
    stack.start("bridge", node.flag)
    with ScorerClient(stack.start("scorer", "--listen=127.0.0.1:0")) as client:
        _says(client, "pod-k", {"gpu": 6}, stack)
        node.store(2, 3, 4)
        node.forget()
        _says(client, "pod-k", {tier: 5}, stack)
        score = client.score(_MODEL, tokens=_TOKENS).scores["pod-k"]
        assert (score.matched_tokens, score.score) == (5 * _BLOCK, pytest.approx(5 * weight))

        before = bytes(node.memory[1])
        node.memory[1][:] = bytes(len(before))
        assert node.load(1) is Outcome.LOADED
        assert node.memory[1] == before

        assert node.files.evict([_key(4)])[_key(4)].outcome is Outcome.MISS
        _says(client, "pod-k", {tier: 4}, stack)

        data = bytearray(node.path(2).read_bytes())
        data[5000] ^= 1
        node.path(2).write_bytes(data)
        assert node.load(2) is Outcome.MISS
        assert node.files.metrics.counts["corrupt"] == 1
        _says(client, "pod-k", {tier: 2}, stack)

        node.path(0).unlink()
        assert node.load(0) is Outcome.MISS
        _says(client, "pod-k", {}, stack)

        node.store(0)
        _says(client, "pod-k", {tier: 2}, stack)


def test_a_store_that_failed_never_reaches_the_index(stack: Stack, nodes: list[Node], tmp_path: Path) -> None:
    """A block whose file could not be written is not scored, while those stored before and after it are."""
    node = Node(tmp_path / "root", "pod-f", "LOCAL")
    nodes.append(node)
    stack.start("bridge", node.flag)
    with ScorerClient(stack.start("scorer", "--listen=127.0.0.1:0")) as client:
        node.store(0)
        node.fs.faults["pwritev"] = fail(EIO)
        result = node.files.store([node.block(1)]).result(90)[_key(1)]
        assert result.outcome is Outcome.FAILED
        assert "EIO" in result.detail
        node.fs.faults.clear()
        node.store(2)
        _says(client, "pod-f", {"disk": 1}, stack)
        node.store(1)
        _says(client, "pod-f", {"disk": 3}, stack)


def test_after_a_restart_the_files_are_told_again(stack: Stack, nodes: list[Node], tmp_path: Path) -> None:
    """A restarted engine counts as empty; its files score again as it stores and loads the blocks they hold."""
    first = Node(tmp_path / "root", "pod-r", "LOCAL")
    nodes.append(first)
    stack.start("bridge", first.flag)
    with ScorerClient(stack.start("scorer", "--listen=127.0.0.1:0")) as client:
        first.compute()
        first.store(0, 1, 2)
        first.forget()
        _says(client, "pod-r", {"disk": 3}, stack)
        nodes.remove(first)
        first.close()
        second = Node(tmp_path / "root", "pod-r", "LOCAL", first.publisher)
        nodes.append(second)
        second.publish({"type": "AllBlocksCleared"})
        _says(client, "pod-r", {}, stack)
        for number in (0, 1):
            second.describe(number)
            move = second.files.load if number else second.files.store
            assert move([second.block(number)]).result(90)[_key(number)].ok
        _says(client, "pod-r", {"disk": 2}, stack)


def test_pods_that_share_a_store_are_both_scored_and_both_hear_of_eviction(
    stack: Stack, nodes: list[Node], tmp_path: Path
) -> None:
    """What one pod stored another loads; both score it as shared until the evictor took it and each asked for it."""
    first, second = (Node(tmp_path / "root", pod, "REMOTE") for pod in ("pod-a", "pod-b"))
    nodes += [first, second]
    stack.start("bridge", first.flag, second.flag)
    with ScorerClient(stack.start("scorer", "--listen=127.0.0.1:0")) as client:
        first.store(0, 1, 2)
        _says(client, "pod-a", {"shared": 3}, stack)
        for number in range(3):
            second.describe(number)
            second.memory[number][:] = bytes(8192)
            assert second.load(number) is Outcome.LOADED
            assert second.memory[number] == first.memory[number]
        _says(client, "pod-b", {"shared": 3}, stack)
        report = evict_root(tmp_path / "root", DiskBudget(max_bytes=1, max_percent=None))
        assert (report.evicted_blocks, report.failed) == (3, 0)
        for node in (first, second):
            assert {node.load(number) for number in range(3)} == {Outcome.MISS}
            assert node.memory == first.memory
            _says(client, node.pod, {}, stack)
