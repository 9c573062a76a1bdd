"""Broker, bridge, worker and scorer on this machine: started in order, watched, and stopped together.

The embedded broker lives in this process; the services are children. A child that dies is not started anew: the
launcher ends and says which one it was and where its log is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Final

import grpc
import msgspec

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.bridge.model import block_key
from kvatlas.bridge.model.topics import TOPICS, changelog_topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers import embedded
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli.entry import EXIT_USAGE
from kvatlas.scorer.v1 import scorer_pb2, scorer_pb2_grpc

_POLL_SECONDS: Final = 0.1
#: All parts together get this long to stop; the longest of them, the bridge, gives Kafka up to 11 s.
_STOP_SECONDS: Final = 15.0
_PROBE_SECONDS: Final = 2.0
_LOG_LINES: Final = 15
_PROBE_MODEL: Final = "kvatlas-readiness"


class LaunchError(KvatlasError):
    """A part did not become ready, or ended by itself; the text names its log."""


class LaunchRefusedError(LaunchError, SettingsError):
    """A part ended because of its settings or rights."""


class Child:
    """One service in its own process."""

    def __init__(self, name: str, document: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        self.address = ""
        self.ready = threading.Event()
        with log.open("ab") as out:
            # A session of its own: Ctrl-C reaches the launcher alone, which stops the parts in order.
            self.process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "kvatlas.deploy.processes.child", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; check() tells why
            self.process.stdin.write(json.dumps(document).encode() + b"\n")
            self.process.stdin.flush()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, output: IO[bytes]) -> None:
        for line in output:
            words = line.decode(errors="replace").split()
            if words[:1] == ["ready"]:
                self.address = words[1] if len(words) > 1 else ""
                self.ready.set()

    def check(self) -> None:
        """Raise LaunchError when the process has ended."""
        code = self.process.poll()
        if code is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            kind = LaunchRefusedError if code == EXIT_USAGE else LaunchError
            raise kind(f"the {self.name} ended by itself with code {code}; its log {self.log} ends:\n{tail}")

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> bool:
        """Wait until it has stopped; end it, with what it has started, at the deadline (monotonic seconds).

        Returns:
            Whether it stopped by itself.
        """
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
            return True
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return False
        finally:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


class Launcher:
    """Runs the parts.

    Args:
        sections: settings by section: ``kafka``, ``log``, ``bridge``, ``worker``, ``scorer``, ``tokenizer``.
        state_dir: logs and tables.
        use_embedded: start the embedded broker instead of using ``kafka.brokers``.
    """

    def __init__(self, sections: dict[str, Any], state_dir: Path, *, use_embedded: bool) -> None:
        self._sections = dict(sections)
        self._state_dir = state_dir
        self._broker = embedded.EmbeddedBroker() if use_embedded else None
        self.children: list[Child] = []

    @property
    def kafka(self) -> KafkaSettings:
        """The broker that is used."""
        kafka: KafkaSettings = self._sections["kafka"]
        return kafka

    @property
    def scorer(self) -> str:
        """Address of the scorer."""
        return self.children[-1].address

    def start(self, stop: threading.Event, timeout_seconds: float = 100.0) -> bool:
        """Start everything and wait until scores can be asked for; False when ``stop`` was set before.

        Raises:
            LaunchError: a part ended or was not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        self._state_dir.mkdir(parents=True, exist_ok=True)
        tables = self._state_dir / ("worker-embedded" if self._broker else "worker")
        if self._broker is not None:
            # The embedded broker starts empty each time; tables of an earlier run belong to another log.
            shutil.rmtree(tables, ignore_errors=True)
            self._broker.start()
            self._sections["kafka"] = msgspec.structs.replace(
                self.kafka, brokers=self._broker.bootstrap, partitions=embedded.PARTITIONS, replication=1
            )
        worker = msgspec.structs.replace(self._sections["worker"], state_dir=str(tables), processes=1)
        if self._broker is not None:  # it answers a fetch only when the wait is over, so the wait is the delay
            wait = min(worker.fetch_wait_ms, embedded.FETCH_MAX_WAIT_MS)
            worker = msgspec.structs.replace(worker, fetch_wait_ms=wait)
        self._sections["worker"] = worker
        # One bridge has nobody to share pods with, and joining a group takes seconds.
        self._sections["bridge"] = msgspec.structs.replace(self._sections["bridge"], ownership="all")
        asyncio.run(ensure_topics(self.kafka, (*TOPICS, *changelog_topics(worker.app))))
        document = {name: msgspec.to_builtins(section) for name, section in self._sections.items()}
        for name in ("worker", "bridge", "scorer"):
            self.children.append(Child(name, document, self._state_dir / f"{name}.log"))
        while not stop.is_set():
            self.check()
            if all(child.ready.is_set() for child in self.children) and self._served():
                return True
            if time.monotonic() > deadline:
                late = [child.name for child in self.children if not child.ready.is_set()] or ["index"]
                raise LaunchError(
                    f"{', '.join(late)} not ready within {timeout_seconds:g} s; logs are in {self._state_dir}"
                )
            stop.wait(_POLL_SECONDS)
        return False

    def check(self) -> None:
        """Raise LaunchError when a part has ended."""
        for child in self.children:
            child.check()

    def stop(self) -> list[str]:
        """Stop the parts, all at once, and the broker that they need after them.

        Returns:
            Names of the parts that did not stop in time and were killed.
        """
        for child in self.children:
            child.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        killed = [child.name for child in self.children if not child.wait(deadline)]
        if self._broker is not None:
            self._broker.stop()
        return killed

    def _served(self) -> bool:
        """Whether one prompt per partition is answered in full: every partition is then served."""
        size = self._sections["worker"].block_size_tokens
        count = self.kafka.partitions
        root = block_key.root_key(_PROBE_MODEL)
        rng = random.Random(0)  # noqa: S311 - any tokens do
        probes: dict[int, list[int]] = {}
        while len(probes) < count:
            tokens = [rng.randrange(1 << 16) for _ in range(size)]
            key = block_key.chain(root, block_key.pack_tokens(tokens))
            probes.setdefault(block_key.partition_of(key, count), [*tokens, 0])
        try:
            with grpc.insecure_channel(self.scorer) as channel:
                ask = scorer_pb2_grpc.ScorerStub(channel)
                return not any(
                    ask.Score(
                        scorer_pb2.ScoreRequest(model=_PROBE_MODEL, tokens=tokens), timeout=_PROBE_SECONDS
                    ).freshness.partial
                    for tokens in probes.values()
                )
        except grpc.RpcError:
            return False
