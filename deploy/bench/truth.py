"""``kvatlas bench truth``: chats under load through Envoy and picker, predicted cached tokens beside the engines' own.

Conversations run beside each other, each on its own pace, and nobody waits for the index: a later turn finds what was
published until then. What the picker predicted is joined with the engine's word by the picker itself, as in production,
and read from ``kv-decisions``; every request that differs is counted by its cause.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.bench._figures import figure
from kvatlas.deploy.gateway.tiny_tokenizer import text
from kvatlas.deploy.processes.demo_gateway import DemoGateway
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.streams.options import WorkerSettings

HELP: Final = "predicted beside real cached tokens, of chats under load through Envoy and picker"

_PODS: Final = 4
_TURNS: Final = 12
_SYSTEMS: Final = 4
_MEASURED: Final = "truth-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--requests", type=int, default=2_000, help="chats that are judged (default %(default)s)")
    parser.add_argument("--conversations", type=int, default=24, help="at a time (default %(default)s)")
    parser.add_argument(
        "--think-seconds", type=float, default=1.0, help="between turns, on average (default %(default)s)"
    )
    parser.add_argument("--deadline-ms", type=float, default=150.0, help="of the picker (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=60_000, help="of each engine (default %(default)s)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures.

    Raises:
        KvatlasError: a part did not start, or a request failed.
    """
    sections = {
        "kafka": KafkaSettings(),
        "log": LogSettings(level="warning"),
        "bridge": BridgeSettings(),
        "worker": WorkerSettings(listen="127.0.0.1:0"),
        "scorer": ScorerSettings(listen="127.0.0.1:0"),
        "picker": PickerSettings(deadline_ms=args.deadline_ms),
    }
    sim = SimPlan(pods=_PODS, blocks=args.blocks, max_running=16, salted_share=0.0)
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="kvatlas-bench-") as folder:
        demo = DemoGateway(sections, sim, Path(folder))
        try:
            if not demo.start(stop):
                raise KvatlasError("the gateway did not start")
            chats = _Chats(demo, args)
            chats.warm(stop)
            began = time.monotonic()
            chats.run()
            seconds = time.monotonic() - began
            verdicts = demo.judged(chats.sent, stop)
        finally:
            demo.stop()
    found = Counter(verdict for name, verdict in verdicts.items() if name.startswith(_MEASURED))
    yield figure("exact", found["exact"] / args.requests, "share")
    yield figure("requests", args.requests / seconds, "requests/s")
    yield figure("cached", chats.cached / max(chats.prompt, 1), "share of prompt tokens")
    for verdict, count in found.items():
        if verdict != "exact":
            yield figure(verdict.replace(" ", "-"), count, "requests")


class _Chats:
    """Conversations beside each other; each new one begins with one of few system prompts.

    Attributes:
        cached, prompt: tokens by the engines' word.
        sent: requests, those before the measurement included.
    """

    def __init__(self, demo: DemoGateway, args: argparse.Namespace) -> None:
        self.cached = self.prompt = self.sent = 0
        self._demo = demo
        self._args = args
        self._lock = threading.Lock()
        self._left = args.requests
        rng = random.Random(11)  # noqa: S311 - text, not secrets
        self._systems = [text(rng, 1_500) for _ in range(_SYSTEMS)]

    def warm(self, stop: threading.Event) -> None:
        """Let every engine publish something: a pod is known by its first event."""
        rng = random.Random(12)  # noqa: S311 - as above
        for number in itertools.count():
            if len(self._demo.known_pods()) == _PODS:
                break
            self._demo.ask(f"warm-{number}", [{"role": "user", "content": text(rng, 2_000)}], stream=False)
            self.sent += 1
        self._demo.drain(stop)

    def run(self) -> None:
        """Send all."""
        with ThreadPoolExecutor(self._args.conversations) as pool:
            for done in [pool.submit(self._talk, number) for number in range(self._args.conversations)]:
                done.result()

    def _talk(self, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311 - as above
        time.sleep(rng.uniform(0, self._args.think_seconds))
        for talk in itertools.count():
            history = [{"role": "system", "content": rng.choice(self._systems)}]
            for turn in range(_TURNS):
                with self._lock:
                    if not self._left:
                        return
                    self._left -= 1
                    self.sent += 1
                history.append({"role": "user", "content": text(rng, 400)})
                answer = self._demo.ask(f"{_MEASURED}{seed}-{talk}-{turn}", history, stream=turn % 2 == 0)
                history.append({"role": "assistant", "content": answer.text})
                with self._lock:
                    self.cached += answer.cached_tokens
                    self.prompt += answer.prompt_tokens
                time.sleep(self._args.think_seconds * rng.uniform(0.5, 1.5))
