"""Fixtures of the integration tests: a real Kafka for the session, fresh topics and groups for each test.

- `brokers`: bootstrap address of the session's node, which all processes of a parallel run share.
- `own_kafka`: a node for one test alone, which may stop, kill, pause or restart it.
- `topic_prefix`, `group_id`: names no other test uses.
- `workers`: a list whose worker processes are ended after the test.
- `create_topic`: makes one topic on the session's node and returns its full name.
- `kafka_admin`: a started admin client of the session's node.

Every test that uses one of them is marked `kafka`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code

from kvatlas.deploy.brokers.errors import BrokerError
from kvatlas.deploy.brokers.kafka import KafkaNode, read_state
from tests.integration.streams_support import WorkerProcess

_KAFKA_FIXTURES = {"brokers", "own_kafka", "node"}
_START_SECONDS = 240.0
#: Nobody kills the shared node, so on a busy machine it keeps its session however late its heartbeats are.
_UNHURRIED = {"broker.session.timeout.ms": "120000"}
#: A test's node lives for seconds: the optimising compiler would cost it more than it brings (half of its CPU time).
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")
#: Modules whose tests share a node or processes: in a parallel run one process has them all.
ONE_PROCESS = {
    "test_deploy_brokers_kafka.py",
    "test_deploy_brokers_security.py",
    "test_deploy_console.py",
    "test_deploy_secured.py",
    "test_library_cases.py",
}
_counter = itertools.count()
_shared = pytest.StashKey[KafkaNode]()
_starting = pytest.StashKey[threading.Thread]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the one node of a parallel run, in the process that hands out the tests and outlives those that run them.

    It starts beside the collection; the processes find it by its state file.
    """
    parallel = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if parallel and _shared not in config.stash:
        node = config.stash[_shared] = KafkaNode(properties=_UNHURRIED)
        start = config.stash[_starting] = threading.Thread(target=_begin, args=(node,), daemon=True)
        start.start()


def _begin(node: KafkaNode) -> None:
    try:
        node.start()
    except BrokerError as error:
        (node.data_dir / "failed").write_text(str(error))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of a parallel run where the node is."""
    node.workerinput["kafka_dir"] = str(node.config.stash[_shared].data_dir)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests one by one, but modules of `ONE_PROCESS` as a whole."""
    # The marker `xdist_group` would say the same, but xdist 3.8 loses it with pytest 9.2.
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - there in parallel runs

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if Path(path).name in ONE_PROCESS else nodeid

    return Scheduling(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the node of a parallel run."""
    node = config.stash.get(_shared, None)
    if node is not None:
        config.stash[_starting].join()
        node.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _KAFKA_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")


@pytest.fixture(scope="session")
def brokers(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap address of the session's node. Do not stop it."""
    shared = getattr(pytestconfig, "workerinput", {}).get("kafka_dir")
    if shared is not None:
        yield _address(Path(shared))
        return
    with KafkaNode(tmp_path_factory.mktemp("kafka"), properties=_UNHURRIED) as node:
        yield node.bootstrap


def _address(folder: Path) -> str:
    """Wait for the node of a parallel run; return its address."""
    deadline = time.monotonic() + _START_SECONDS
    while (state := read_state(folder)) is None:
        failed = folder / "failed"
        assert not failed.exists(), failed.read_text()
        assert time.monotonic() < deadline, f"no Kafka in {folder} after {_START_SECONDS:g} s"
        time.sleep(0.05)
    return state.bootstrap


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[KafkaNode]:
    """A started node of this test alone; its data folder is `own_kafka.data_dir`."""
    node = KafkaNode(tmp_path / "own-kafka")
    node.start()
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture
def workers() -> Iterator[list[WorkerProcess]]:
    """Put every worker here; whatever still runs at the end is ended."""
    started: list[WorkerProcess] = []
    yield started
    for worker in started:
        worker.close()


@pytest.fixture
def topic_prefix() -> str:
    """A topic prefix of this test alone, such as `t41-7-`."""
    return f"t{os.getpid()}-{next(_counter)}-"


@pytest.fixture
def group_id(topic_prefix: str) -> str:
    """A consumer group of this test alone."""
    return f"{topic_prefix}group"


@pytest.fixture
async def kafka_admin(brokers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started admin client of the session's node."""
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


CreateTopic = Callable[..., Awaitable[str]]


@pytest.fixture
def create_topic(kafka_admin: AIOKafkaAdminClient, topic_prefix: str) -> CreateTopic:
    """What makes topics: call it with a short name, partitions and configuration; it returns the full name."""

    async def create(name: str = "topic", partitions: int = 4, config: Mapping[str, str] | None = None) -> str:
        full = topic_prefix + name
        reply = await kafka_admin.create_topics([NewTopic(full, partitions, 1, topic_configs=dict(config or {}))])
        for topic, code, message in reply.topic_errors:
            if code:
                raise for_code(code)(f"{topic}: {message}")
        return full

    return create
