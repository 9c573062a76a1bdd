"""The demonstration: simulated pods, the whole pipeline on the embedded broker, scores checked against the truth."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.processes.launcher import Launcher
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.errors import ClientError

_DRAIN_SECONDS: Final = 20.0
_ANSWER_SECONDS: Final = 5.0
_TICK_SECONDS: Final = 0.25
#: Requests of a tick while the demonstration is kept.
_KEPT_REQUESTS: Final = 2
_SAME: Final = 1e-6


class DemoError(KvatlasError):
    """The demonstration did not end as it must; the text says where."""


class PodView(NamedTuple):
    """One row of the live view.

    Attributes:
        messages: messages that the pod has published.
        seen: messages that the scorer knows of.
        blocks: blocks that the pod holds.
        age_ms: age of the newest message that the scorer knows of.
    """

    pod: str
    messages: int
    seen: int
    blocks: int
    age_ms: float

    @property
    def lag(self) -> int:
        """Messages published and not yet known to the scorer."""
        return self.messages - self.seen


class Check(NamedTuple):
    """One prompt: what each pod scored, and what it must score."""

    prompt: str
    tokens: int
    scored: dict[str, float]
    expected: dict[str, float]

    @property
    def equal(self) -> bool:
        """Whether the scores are those of the truth, pod by pod."""
        return self.scored.keys() == self.expected.keys() and all(
            abs(score - self.expected[pod]) < _SAME for pod, score in self.scored.items()
        )


class Demo:
    """Fleet and pipeline of one demonstration.

    Args:
        sections: settings of the services; engines are added here.
        sim: settings of the fleet.
        state_dir: logs and tables.
        console: serve the console too.
    """

    def __init__(self, sections: dict[str, Any], sim: SimPlan, state_dir: Path, *, console: bool = False) -> None:
        self._console = console
        self._sim = sim
        self.fleet = Fleet(sim, clock=time.time, monotonic=time.monotonic)
        self._sections = sections
        self._state_dir = state_dir
        self._launcher: Launcher | None = None
        self._scorer: ScorerClient | None = None
        self._served: list[Request] = []

    def start(self, stop: threading.Event) -> bool:
        """Start everything; False when ``stop`` was set before it was ready.

        Raises:
            LaunchError: a part ended or was not ready in time.
        """
        self.fleet.start()
        bridge = msgspec.structs.replace(self._sections["bridge"], engines=self.fleet.engines)
        self._launcher = Launcher(
            {**self._sections, "bridge": bridge}, self._state_dir, use_embedded=True, console=self._console
        )
        if not self._launcher.start(stop):
            return False
        self._scorer = ScorerClient(self._launcher.scorer, timeout_seconds=_ANSWER_SECONDS)
        return True

    def traffic(self, seconds: float, stop: threading.Event, show: Callable[[list[PodView]], None]) -> None:
        """Send multi-turn traffic for a time, showing the state now and then.

        Raises:
            LaunchError: a part ended meanwhile.
        """
        assert self._launcher is not None
        until = time.monotonic() + seconds
        per_tick = max(1, round(self._sim.requests_per_second * _TICK_SECONDS))
        while time.monotonic() < until and not stop.wait(_TICK_SECONDS):
            self._served = [*self._served, *self.fleet.serve(per_tick)][-200:]
            self._launcher.check()
            show(self.view())

    def keep(self, stop: threading.Event) -> None:
        """Go on with traffic until ``stop`` is set, each request to the pod that the scorer picks and reports.

        Raises:
            LaunchError: a part ended in a way that a restart does not help.
        """
        assert self._launcher is not None
        while not stop.wait(_TICK_SECONDS):
            self.fleet.serve(_KEPT_REQUESTS, self._picked)
            self._launcher.check()

    def _picked(self, request: Request) -> str:
        assert self._scorer is not None
        asked = score_request(
            self._sim.model,
            tokens=request.tokens,
            cache_salt=request.cache_salt,
            lora=request.lora,
            request_id=f"demo-{self.fleet.sent}",
        )
        try:
            return self._scorer.pick(asked, report=True).pod
        except ClientError:  # the scorer is being started again: the fleet goes on without it
            return ""

    @property
    def addresses(self) -> str:
        """Where the parts are, for people."""
        assert self._launcher is not None
        return f"scorer={self._launcher.scorer}" + (f" console={self._launcher.console}" if self._console else "")

    def view(self) -> list[PodView]:
        """Return the state of every pod, as published and as the scorer knows it."""
        assert self._scorer is not None
        known = {pod.pod: pod for pod in self._scorer.list_pods()}
        return [
            PodView(
                pod=status.pod,
                messages=status.sequence + 1,
                seen=known[status.pod].last_sequence + 1 if status.pod in known else 0,
                blocks=status.blocks,
                age_ms=known[status.pod].age_ms if status.pod in known else -1.0,
            )
            for status in self.fleet.status()
        ]

    def drain(self, stop: threading.Event, show: Callable[[list[PodView]], None]) -> None:
        """Wait until the scorer knows every message that was published.

        Raises:
            DemoError: it does not within 20 s.
        """
        self.fleet.drain()
        until = time.monotonic() + _DRAIN_SECONDS
        while not stop.is_set():
            rows = self.view()
            show(rows)
            if all(row.lag <= 0 for row in rows):
                return
            if time.monotonic() > until:
                behind = ", ".join(f"{row.pod} by {row.lag} messages" for row in rows if row.lag > 0)
                raise DemoError(f"the index did not catch up in {_DRAIN_SECONDS:g} s: {behind}")
            stop.wait(_TICK_SECONDS)

    def checks(self, count: int) -> Iterator[Check]:
        """Score prompts that were served and one that never was, beside the truth."""
        rng = random.Random(self._sim.seed)  # noqa: S311 - which prompts are shown
        chosen = rng.sample(self._served, min(count, len(self._served)))
        for number, request in enumerate(chosen, start=1):
            yield self._check(f"conversation {number}", request)
        stranger = Request(tokens=[rng.randrange(self._sim.vocabulary) for _ in range(128)])
        yield self._check("never seen", stranger)

    def _check(self, name: str, request: Request) -> Check:
        """Score one prompt; asked again for a while, since the last block updates may still be on their way."""
        assert self._scorer is not None
        until = time.monotonic() + _DRAIN_SECONDS
        while True:
            expected = self.fleet.expect(request.tokens, cache_salt=request.cache_salt, lora=request.lora)
            answer = self._scorer.score(
                self._sim.model, tokens=request.tokens, cache_salt=request.cache_salt, lora=request.lora
            )
            found = Check(
                name,
                len(request.tokens),
                {pod: score.score for pod, score in answer.scores.items()},
                {pod: truth.score for pod, truth in expected.items()},
            )
            if found.equal or time.monotonic() > until:
                return found
            time.sleep(_TICK_SECONDS)

    def stop(self) -> None:
        """Stop the parts and the fleet."""
        if self._scorer is not None:
            self._scorer.close()
        if self._launcher is not None:
            self._launcher.stop()
        self.fleet.close()
