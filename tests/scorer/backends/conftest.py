"""Every backend as a fixture; a real redis-server on a free port."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvatlas.scorer.backends import Backend, MemoryBackend
from kvatlas.scorer.backends.redis import RedisBackend
from kvatlas.scorer.backends.rocks import RocksBackend


class RedisServer:
    """A server in a folder of its own that tests may kill and start again; every write is on disk at once."""

    def __init__(self, folder: Path) -> None:
        executable = shutil.which("redis-server") or shutil.which("valkey-server")
        assert executable, "redis-server is missing; `.ci/system-deps` installs it"
        self._command = [executable]
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([*self._command, *flags, *durable], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError((self._folder / "redis.log").read_text())

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for the session; do not kill it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
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


@pytest.fixture(params=["memory", "memory-bytes", "rocksdb", "redis"])
def make_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """What makes one kind of backend over one store: called again, it opens the same store where there is one."""
    kind = request.param
    if kind == "memory":
        return MemoryBackend
    if kind == "memory-bytes":
        return lambda: MemoryBackend(None, max_bytes=256 * 1024 * 1024)
    if kind == "rocksdb":
        return lambda: RocksBackend(tmp_path / "index.db", cache_bytes=8 * 1024 * 1024)
    server = request.getfixturevalue("redis_server")
    prefix = f"test-{tmp_path.name}-{time.monotonic_ns()}"
    return lambda: RedisBackend(server.url, prefix=prefix)


@pytest.fixture
async def backend(make_backend: Make) -> AsyncIterator[Backend]:
    """An open, empty backend of each kind."""
    opened = make_backend()
    await opened.start()
    yield opened
    await opened.close()
