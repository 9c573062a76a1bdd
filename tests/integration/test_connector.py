"""The connector's files in the index: paged blocks spill to disk, and the scores of the real pipeline say so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.connector.files.catalog import Budget
from kvatlas.connector.files.events import BlockMeta, StorageEvents
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from kvatlas.connector.offload.engine import EngineSettings, Item, OffloadEngine
from kvatlas.connector.offload.transfer import PagedKV
from kvatlas.connector.outcome import Outcome
from kvatlas.scorer.client import ScorerClient
from tests.connector.conftest import EIO, FaultyFileSystem, fail
from tests.integration import pipeline_support as support
from tests.integration.pipeline_support import Service

pytestmark = pytest.mark.torch

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
        settings = FileTierSettings(root=root, threads=2, budget=Budget(max_percent=None))
        self.files = FileTier(settings, fingerprint, fs=self.fs, listener=self.events)
        self.memory = torch.arange(_BLOCKS * 2048, dtype=torch.float32).view(_BLOCKS, 2048).clone()
        kv = PagedKV.from_layers([[self.memory]])
        # One slot of host memory, so that a load comes from the files.
        self.core = OffloadEngine(kv, EngineSettings(host_bytes=kv.slot_bytes, threads=1), self.files)

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
            result = self.core.store([Item(_key(number), 0, number)]).result(90)[_key(number)]
            assert result.outcome is Outcome.STORED, result

    def load(self, number: int) -> Outcome:
        """Bring one block back."""
        return self.core.load([Item(_key(number), 0, number)]).result(90)[_key(number)].outcome

    def path(self, number: int) -> Path:
        """Return a block's file."""
        (found,) = self.files.directory.rglob(f"{_key(number).hex()}.kv")
        return found

    def close(self) -> None:
        """End the threads and close the sockets."""
        self.core.close()
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

        before = node.memory[1].clone()
        node.memory[1].zero_()
        assert node.load(1) is Outcome.LOADED
        assert torch.equal(node.memory[1], before)

        assert node.core.evict([_key(4)])[_key(4)].outcome is Outcome.MISS
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
        result = node.core.store([Item(_key(1), 0, 1)]).result(90)[_key(1)]
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
            item = Item(_key(number), 0, number)
            move = second.core.load if number else second.core.store
            assert move([item]).result(90)[item.key].ok
        _says(client, "pod-r", {"disk": 2}, stack)
