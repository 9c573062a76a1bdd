"""Every backend as a fixture; real Redis and Valkey servers on free ports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvatlas.scorer.library.backends import Backend, MemoryBackend
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from tests.integration.redis_support import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for the session; do not kill it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Valkey server for the session; do not kill it."""
    server = RedisServer(tmp_path_factory.mktemp("valkey"), "valkey")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of one test alone, which may kill and start it."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


Make = Callable[[], Backend]


@pytest.fixture(params=["memory", "memory-bytes", "rocksdb", "redis", "valkey"])
def make_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """What makes one kind of backend over one store: called again, it opens the same store where there is one."""
    kind = request.param
    if kind == "memory":
        return MemoryBackend
    if kind == "memory-bytes":
        return lambda: MemoryBackend(None, max_bytes=256 * 1024 * 1024)
    if kind == "rocksdb":
        return lambda: RocksBackend(tmp_path / "index.db", cache_bytes=8 * 1024 * 1024)
    server = request.getfixturevalue(f"{kind}_server")
    prefix = f"test-{tmp_path.name}-{time.monotonic_ns()}"
    return lambda: RedisBackend(server.url, prefix=prefix, lookup_seconds=60)


@pytest.fixture
async def backend(make_backend: Make) -> AsyncIterator[Backend]:
    """An open, empty backend of each kind."""
    opened = make_backend()
    await opened.start()
    yield opened
    await opened.close()
