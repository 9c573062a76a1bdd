"""Broker, bridge, worker and scorer on this machine: started in order, watched, and stopped together.

The embedded broker lives in this process; the services are children. A child that dies is started again, unless a
restart cannot help: then the launcher ends and says which one it was and where its log is.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.model import block_key
from kvatlas.bridge.model.topics import TOPICS, changelog_topics
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers import embedded
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.console.options import token_of
from kvatlas.deploy.processes.child import document
from kvatlas.deploy.processes.supervisor import Child, Kept, LaunchError, stop_all
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError

_POLL_SECONDS: Final = 0.1
_PROBE_SECONDS: Final = 2.0
_PROBE_MODEL: Final = "kvatlas-readiness"


class Launcher:
    """Runs the parts.

    Args:
        sections: settings by section: ``kafka``, ``log``, ``bridge``, ``worker``, ``scorer``, ``tokenizer``, and
            ``console`` where there is a console, and ``picker`` with that or ``picks``.
        state_dir: logs and tables.
        use_embedded: start the embedded broker instead of using ``kafka.brokers``.
        console: serve the console too.
        picks: the worker scores and picks in its own process as well.
    """

    def __init__(
        self,
        sections: dict[str, Any],
        state_dir: Path,
        *,
        use_embedded: bool,
        console: bool = False,
        picks: bool = False,
    ) -> None:
        self._worker = "picking-worker" if picks else "worker"
        self._sections = dict(sections)
        self._state_dir = state_dir
        self._with_console = console
        self._page_token = ""
        self._broker = embedded.EmbeddedBroker() if use_embedded else None
        self.parts: list[Kept] = []

    @property
    def kafka(self) -> KafkaSettings:
        """The broker that is used."""
        kafka: KafkaSettings = self._sections["kafka"]
        return kafka

    @property
    def scorer(self) -> str:
        """Address of the scorer; it stays over restarts."""
        return self._address("scorer") or str(self._sections["scorer"].listen)

    @property
    def console(self) -> str:
        """Address of the console's page, with its token where one was made; it stays over restarts."""
        return self._address("console") + (f"#token={self._page_token}" if self._page_token else "")

    def _address(self, name: str) -> str:
        return next((part.child.address(name) for part in self.parts if part.name == name), "")

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
        self._sections["worker"] = worker
        # One bridge has nobody to share pods with, and joining a group takes seconds.
        self._sections["bridge"] = msgspec.structs.replace(self._sections["bridge"], ownership="all")
        asyncio.run(ensure_topics(self.kafka, (*TOPICS, *changelog_topics(worker.app))))
        for name in ("worker", "bridge", "scorer"):
            self.parts.append(Kept(name, lambda restarts, name=name: self._child(name, restarts)))  # type: ignore[misc]
        if not self._wait(stop, deadline, timeout_seconds, self._served):
            return False
        # Whoever has the scorer's address keeps it: the next process listens where this one does.
        self._sections["scorer"] = msgspec.structs.replace(self._sections["scorer"], listen=self.scorer)
        if not self._with_console:
            return True
        self._add_console()
        if not self._wait(stop, deadline, timeout_seconds, lambda: True):
            return False
        listen = self._address("console").removeprefix("http://").rstrip("/")
        self._sections["console"] = msgspec.structs.replace(self._sections["console"], listen=listen)
        return True

    def _wait(self, stop: threading.Event, deadline: float, timeout_seconds: float, whole: Callable[[], bool]) -> bool:
        """Wait until all parts are ready and ``whole`` says so; False when ``stop`` was set before.

        Raises:
            LaunchError: a part ended or was not ready in time.
        """
        while not stop.is_set():
            self.check()
            if all(part.child.ready.is_set() for part in self.parts) and whole():
                return True
            if time.monotonic() > deadline:
                raise self._late(timeout_seconds)
            stop.wait(_POLL_SECONDS)
        return False

    def _add_console(self) -> None:
        """Start the console, with a token that stays over restarts."""
        settings = self._sections["console"]
        options = settings.scorer.partition(",")[1:]
        settings = msgspec.structs.replace(settings, scorer=self.scorer + "".join(options))
        token, made = token_of(settings)
        if made:
            file = self._state_dir / "console-token"
            file.touch(mode=0o600)
            file.write_text(token, encoding="utf-8")
            settings, self._page_token = msgspec.structs.replace(settings, page_token_file=str(file)), token
        self._sections["console"] = settings
        self.parts.append(Kept("console", lambda restarts: self._child("console", restarts)))

    def _child(self, name: str, restarts: Restarts) -> Child:
        part = self._worker if name == "worker" else name
        given = document(part, self._sections, prepared=True, restarts=restarts)
        return Child(part, given, self._state_dir / f"{name}.log")

    def _late(self, timeout_seconds: float) -> LaunchError:
        late = [part for part in self.parts if not part.child.ready.is_set()]
        names = ", ".join(part.name for part in late) or "index"
        why = "".join(f"; the {part.name}: {part.restarts.note()}" for part in self.parts if part.restarts.total)
        return LaunchError(f"{names} not ready within {timeout_seconds:g} s{why}; logs are in {self._state_dir}")

    def check(self) -> None:
        """Start parts again that have ended.

        Raises:
            LaunchRefusedError: one ended by something that a restart does not help.
        """
        for part in self.parts:
            part.look()

    def stop(self) -> list[str]:
        """Stop the parts, all at once, and the broker that they need after them.

        Returns:
            Names of the parts that did not stop in time and were killed.
        """
        killed, _ = stop_all([part.child for part in self.parts])
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
            with ScorerClient(self.scorer, timeout_seconds=_PROBE_SECONDS) as scorer:
                return not any(scorer.score(_PROBE_MODEL, tokens=some).freshness.partial for some in probes.values())
        except ClientError:
            return False
