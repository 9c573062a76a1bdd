"""The fleet: pods, the traffic that reaches them at a rate, and what is true of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import yaml

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.errors import UnknownPodError
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.pod import WEIGHTS, Expected, PodStatus, Publisher, PublisherFactory, SimPod

#: Longest time without a look at the pods while they have work, in seconds.
_TICK_SECONDS: Final = 0.01


class Fleet:
    """Pods under traffic. Methods may be called from any thread; a change of the pods and its events are one.

    ``serve(n)`` runs requests at once, for tests; ``run(stop)`` runs them at the rate of the settings.

    Args:
        settings: how many pods and what traffic.
        clock: wall clock in seconds since the epoch, for the batches' timestamps.
        monotonic: for the rate.
        publisher: makes each pod's publisher; None for the real one.
    """

    def __init__(
        self,
        settings: SimPlan,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        publisher: PublisherFactory | None = None,
    ) -> None:
        self.settings = settings
        self._monotonic = monotonic
        self._lock = threading.RLock()
        self._paused = False
        self._rng = random.Random(settings.seed ^ 0x5EED)  # noqa: S311 - traffic, not secrets
        self._traffic: Iterator[Request] = traffic.requests(settings)
        self._home: dict[int, str] = {}
        self.sent = 0
        self.pods: dict[str, SimPod] = {}
        for number in range(settings.pods):
            name = f"{settings.pod_prefix}{number}"
            live, replay = (0, 0) if not settings.base_port else (settings.base_port + 2 * number + i for i in (0, 1))
            self.pods[name] = SimPod(
                name,
                blocks=settings.blocks,
                cpu_blocks=settings.cpu_blocks,
                block_size_tokens=settings.block_size_tokens,
                canonical_block_size_tokens=settings.canonical_block_size_tokens,
                model=settings.model,
                seed=self._rng.getrandbits(64),
                max_running=settings.max_running,
                publisher=publisher or self._publisher(name),
                endpoints=(f"tcp://{settings.host}:{live}", f"tcp://{settings.host}:{replay}"),
                clock=clock,
            )

    def _publisher(self, pod: str) -> PublisherFactory:
        settings = self.settings
        topic = settings.topic.format(pod=pod, model=settings.model)

        def make(live: str, replay: str) -> Publisher:
            return EnginePublisher(live, replay, topic=topic, wire=settings.wire, bind=True)

        return make

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind every pod's sockets and write the endpoints' file when one is asked for."""
        for pod in self.pods.values():
            pod.start()
        if self.settings.engines_file:
            self.write_engines(Path(self.settings.engines_file))

    def close(self) -> None:
        """Close every socket."""
        for pod in self.pods.values():
            pod.close()

    @property
    def engines(self) -> list[str]:
        """Endpoints as ``--engine`` takes them: ``tcp://HOST:PORT,tcp://HOST:REPLAYPORT`` per pod."""
        found = []
        for pod in self.pods.values():
            status = pod.status()
            found.append(",".join(filter(None, (status.endpoint, status.replay_endpoint))))
        return found

    def write_engines(self, path: Path) -> None:
        """Write the endpoints' file that the bridge watches; replaced at once, so no reader sees half of it."""
        entries = []
        for pod in self.pods.values():
            status = pod.status()
            replay = f",{status.replay_endpoint}" if status.replay_endpoint else ""
            entries.append(f"{status.endpoint}{replay},pod={status.pod},model={self.settings.model}")
        draft = path.with_name(path.name + ".new")
        try:
            draft.write_text(yaml.safe_dump({"engines": entries}, sort_keys=False), encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise SettingsError(f"[sim] engines_file {path} cannot be written: {error.strerror}") from error

    def pod(self, name: str) -> SimPod:
        """Return a pod.

        Raises:
            UnknownPodError: there is none of that name.
        """
        try:
            return self.pods[name]
        except KeyError:
            raise UnknownPodError(f"no pod {name!r} in the fleet; there are {', '.join(self.pods)}") from None

    # --- traffic ------------------------------------------------------------------------------------------------

    def send(self, request: Request, to: str = "") -> str:
        """Queue a request at a pod, else mostly at the one of the session's turn before; returns the pod's name."""
        with self._lock:
            name = to if to in self.pods else self._home.get(request.session)
            if name is None or (name != to and self._rng.random() >= self.settings.affinity):
                name = self._rng.choice(list(self.pods))
            self._home[request.session] = name
            pod = self.pods[name]
            if self._rng.random() < self.settings.clear_probability:
                pod.clear()
            if self._rng.random() < self.settings.restart_probability:
                pod.restart()
            pod.submit(request)
            self.sent += 1
            return name

    def serve(self, count: int, choose: Callable[[Request], str] | None = None) -> list[Request]:
        """Send the next ``count`` requests at once and work until all are done; returns them.

        Args:
            count: how many.
            choose: names the pod of each, empty for none; None for the fleet's own choice.
        """
        with self._lock:
            batch = list(islice(self._traffic, count))
            for number, request in enumerate(batch):
                self.send(request, choose(request) if choose is not None else "")
                if number % len(self.pods) == 0:
                    self.step()
            self.drain()
            return batch

    def step(self) -> bool:
        """Run one scheduler step on every pod; returns whether any has work left."""
        with self._lock:
            busy = [pod.step() for pod in self.pods.values()]  # a list: every pod steps, also after a busy one
            return any(busy)

    def drain(self) -> None:
        """Work until no pod has any left."""
        while self.step():
            pass

    def pause(self) -> None:
        """Send nothing more and finish what runs; when this returns, no event follows until ``resume``."""
        with self._lock:
            self._paused = True
            self.drain()

    def resume(self) -> None:
        """Send requests again."""
        with self._lock:
            self._paused = False

    def run(self, stop: threading.Event) -> None:
        """Send traffic at its rate until ``stop`` is set, the traffic or the time of the settings is over."""
        settings = self.settings
        started = self._monotonic()
        shift = 0.0  # time that pauses took
        for request in islice(self._traffic, settings.requests or None):
            while not stop.is_set():
                now = self._monotonic()
                if settings.duration_seconds and now - started >= settings.duration_seconds:
                    return
                if self._paused:
                    stop.wait(_TICK_SECONDS)
                    shift += self._monotonic() - now
                    continue
                wait = started + shift + request.at_seconds - now
                if wait <= 0:
                    break
                busy = self.step()
                stop.wait(min(wait, _TICK_SECONDS) if busy else min(wait, 0.2))
            if not self._send_unless(stop, request):
                return
        self.drain()

    def _send_unless(self, stop: threading.Event, request: Request) -> bool:
        while not stop.is_set():
            with self._lock:
                if not self._paused:  # looked at under the lock: after a pause returned, nothing is sent
                    self.send(request)
                    self.step()
                    return True
            stop.wait(_TICK_SECONDS)
        return False

    # --- truth --------------------------------------------------------------------------------------------------

    def expect(
        self,
        tokens: Sequence[int],
        *,
        model: str | None = None,
        cache_salt: str | None = None,
        lora: str | None = None,
        weights: Mapping[str, float] = WEIGHTS,
    ) -> dict[str, Expected]:
        """Return what every pod must score for a prompt; pods without a hit are absent."""
        with self._lock:
            answers = {
                name: pod.expect(
                    tokens,
                    model=self.settings.model if model is None else model,
                    cache_salt=cache_salt,
                    lora=lora,
                    weights=weights,
                )
                for name, pod in self.pods.items()
            }
        return {name: answer for name, answer in answers.items() if answer is not None}

    def truth(self) -> dict[str, dict[str, list[str]]]:
        """Return what every pod holds now: pod -> tier -> block keys in hexadecimal."""
        with self._lock:
            return {name: pod.held() for name, pod in self.pods.items()}

    def status(self) -> list[PodStatus]:
        """Return figures of every pod."""
        return [pod.status() for pod in self.pods.values()]
