"""``kvatlas bench picker``: what the picker adds to a request, beside Envoy alone in the same run.

The pipeline runs on the embedded broker, simulated pods have published the prompts' blocks, and the requests end at
pods that cost nothing. The Envoys stand side by side and are measured in turns; compare figures of one run only.
``floor`` is Envoy with our external processor whose decision is always the same: what no picker on it goes below.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.bench._figures import figure
from kvatlas.deploy.bench._http import FastPod, closed_loop, open_loop, post
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.gateway.config import KINDS, GatewayOptions, document, plain
from kvatlas.deploy.gateway.envoy import Envoy
from kvatlas.deploy.gateway.tiny_tokenizer import text, write_tokenizer
from kvatlas.deploy.processes import child
from kvatlas.deploy.processes.launcher import Launcher
from kvatlas.deploy.processes.supervisor import Child
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings

HELP: Final = "latency, throughput and CPU that the picker adds to Envoy alone"

_MODEL: Final = "sim-model"
_CASES: Final = ("open-100", "closed-8", "large", "stream", "shared")
#: So soon every picker is to know what another has given out.
_SHARED_SECONDS: Final = 0.05
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--case", action="append", choices=_CASES, help="only this case; may be repeated")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turns (default %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="override", help="of the gateway (default %(default)s)")
    parser.add_argument("--within-worker", action="store_true", help="picker and scorer in the worker's process")
    parser.add_argument("--prompts", type=int, default=64, help="different prompts (default %(default)s)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures.

    Raises:
        KvatlasError: a part did not start.
    """
    with tempfile.TemporaryDirectory(prefix="kvatlas-bench-") as name:
        stand = _Stand(Path(name), args)
        try:
            stand.start()
            for case in args.case or _CASES:
                yield from stand.measure(case)
        finally:
            stand.stop()


class _Stand:
    """Pipeline, picker, two Envoys and fast pods."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._folder = folder
        self._args = args
        self._loop = asyncio.new_event_loop()
        self._fleet = Fleet(SimPlan(pods=4, blocks=200_000, model=_MODEL), clock=time.time, monotonic=time.monotonic)
        self._pods = [FastPod() for _ in self._fleet.pods]
        self._launcher: Launcher | None = None
        self._picker: Child | None = None
        self._parts: dict[str, Any] = {}
        self._floor: subprocess.Popen[str] | None = None
        self._envoys: dict[str, Envoy] = {}
        self._telemetry = ""
        self._rng = random.Random(7)  # noqa: S311 - text, not secrets

    def start(self) -> None:
        """Start everything and let the index know the prompts."""
        write_tokenizer(self._folder / "model")
        tokenizer = TokenizerSettings(
            models=(f"{_MODEL}={self._folder / 'model'}",), prefix_cache_bytes=64 * 1024 * 1024
        )
        self._fleet.start()
        for pod in self._pods:
            self._loop.run_until_complete(pod.start())
        self._launch(tokenizer)
        self._prompts = [self._prompt(8_000) for _ in range(self._args.prompts)]
        self._large = [self._prompt(1_000_000) for _ in range(2)]
        self._publish([*self._prompts, *self._large])
        addresses = [pod.address for pod in self._pods]
        assert self._picker is not None
        # As `kvatlas gateway` writes it.
        options = GatewayOptions(
            kind=self._args.kind, pickers=[self._picker.address("picker")], pods=addresses, observe=True
        )
        floor = msgspec.structs.replace(options, pickers=[self._start_floor(addresses[0])])
        documents = {
            "alone": plain(options),
            "floor": document(floor),
            "picker": document(options),
            "unobserved": document(msgspec.structs.replace(options, observe=False)),
        }
        for name, made in documents.items():
            folder = self._folder / name
            folder.mkdir()
            self._envoys[name] = Envoy(made, folder)
            self._envoys[name].start()
        self._until(lambda: all(self._healthy(name) for name in documents if name != "alone"), "Envoy sees the picker")

    def _start_floor(self, pod: str) -> str:
        """Start the processor that decides nothing; returns its address."""
        command = [sys.executable, "-m", "kvatlas.deploy.bench._floor", pod]
        self._floor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        assert self._floor.stdout is not None
        if not (address := self._floor.stdout.readline().strip()):
            raise KvatlasError(f"the floor's processor ended with code {self._floor.wait()}")
        return address

    def _healthy(self, name: str) -> bool:
        return self._envoys[name].healthy_pickers == 1

    def _launch(self, tokenizer: TokenizerSettings) -> None:
        scorer = ScorerSettings(listen="127.0.0.1:0", outcome_delay_ms=0.0)
        sections = {
            "kafka": KafkaSettings(),
            "log": LogSettings(level="warning"),
            "bridge": BridgeSettings(engines=self._fleet.engines),
            "worker": WorkerSettings(listen="127.0.0.1:0"),
            "scorer": scorer,
            "tokenizer": tokenizer,
        }
        names = [
            f"{pod.address},pod={name},model={_MODEL}" for name, pod in zip(self._fleet.pods, self._pods, strict=True)
        ]
        picker = PickerSettings(listen="127.0.0.1:0", endpoints=names, scrape_seconds=0.0, drain_seconds=0.0)
        within = self._args.within_worker
        self._telemetry = f"127.0.0.1:{free_ports(1)[0]}"
        sections["picker"] = msgspec.structs.replace(picker, telemetry_listen=self._telemetry if within else "")
        self._launcher = Launcher(sections, self._folder, use_embedded=True, picks=within)
        self._launcher.start(threading.Event())
        self._parts = {**sections, "kafka": self._launcher.kafka, "picker": picker}
        if within:
            self._picker = next(part.child for part in self._launcher.parts if part.name == "worker")
        else:
            self._picker, self._telemetry = self._start_picker()

    def _start_picker(self) -> tuple[Child, str]:
        """Start a picker; returns it with the address of its metrics."""
        telemetry = f"127.0.0.1:{free_ports(1)[0]}"
        picker = msgspec.structs.replace(self._parts["picker"], telemetry_listen=telemetry)
        document_ = child.document("picker", {**self._parts, "picker": picker})
        started = Child("picker", document_, self._folder / "picker.log")
        self._until(started.ready.is_set, "the picker is ready")
        return started, telemetry

    def _prompt(self, characters: int) -> str:
        return text(self._rng, characters)

    def _publish(self, prompts: Sequence[str]) -> None:
        """Let simulated pods hold the prompts, and wait until the picker's index does."""
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra

        encoder = Tokenizer.from_file(str(self._folder / "model" / "tokenizer.json"))
        names = list(self._fleet.pods)
        for number, prompt in enumerate(prompts):
            pod = self._fleet.pods[names[number % len(names)]]
            pod.end(pod.begin(Request(tokens=encoder.encode(prompt).ids)))
        assert self._launcher is not None
        with ScorerClient(self._launcher.scorer, timeout_seconds=5) as scorer:

            def known() -> bool:
                pods = {pod.pod: pod.last_sequence for pod in scorer.list_pods()}
                return all(pods.get(pod.pod, -1) >= pod.sequence for pod in self._fleet.status())

            self._until(known, "the index has the prompts")

    def _until(self, true: Any, what: str) -> None:
        deadline = time.monotonic() + 90
        while not true():
            if time.monotonic() > deadline:
                raise KvatlasError(f"{what}: not within 90 s")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop everything."""
        for envoy in self._envoys.values():
            envoy.stop()
        if self._picker is not None and not self._args.within_worker:
            self._picker.terminate()
            self._picker.wait(time.monotonic() + 10)
        if self._floor is not None:
            self._floor.communicate()
        if self._launcher is not None:
            self._launcher.stop()
        for pod in self._pods:
            self._loop.run_until_complete(pod.stop())
        self._fleet.close()
        self._loop.close()

    # --- measuring --------------------------------------------------------------------------------------------------

    def measure(self, case: str) -> Iterator[dict[str, Any]]:
        """Measure one case: Envoy alone and with the picker in turns."""
        if case == "stream":
            yield from self._stream()
            return
        if case == "shared":
            yield from self._shared()
            return
        prompts = self._large if case == "large" else self._prompts
        bodies = [json.dumps({"model": _MODEL, "prompt": prompt, "max_tokens": 1}).encode() for prompt in prompts]
        requests = [post("/v1/completions", body) for body in bodies]
        for name in ("picker", "floor", "alone"):  # what is measured later has been seen, and connections are open
            self._send(case, name, requests, 1.0)
        taken: dict[str, list[list[float]]] = {"alone": [], "floor": [], "picker": []}
        spent = dict.fromkeys(taken, 0.0)
        for _ in range(self._args.rounds):
            for name, rounds in taken.items():
                before = self._cpu(name)
                rounds.append(self._send(case, name, requests, self._args.seconds))
                spent[name] += self._cpu(name) - before
        figures = {name: _figures(rounds, self._args.seconds) for name, rounds in taken.items()}
        alone = figures["alone"]
        for name, found in figures.items():
            yield figure(f"{case}-{name}", found["rate"], "requests/s", p50=found["p50"] * 1e3, p99=found["p99"] * 1e3)
            if name != "alone":
                of = "" if name == "picker" else f"{name}-"
                yield figure(f"{case}-{of}p50-ratio", found["p50"] / alone["p50"], "times")
                yield figure(f"{case}-{of}p99-ratio", found["p99"] / alone["p99"], "times")
                count = sum(len(one) for one in taken[name])
                yield figure(f"{case}-{of}cpu", spent[name] / max(count, 1) * 1e3, "ms/request")
        scored = self._counted("kvatlas_picker_decisions_total") or 1.0
        yield figure(f"{case}-degraded", self._counted("kvatlas_picker_degraded_total") / scored, "share so far")
        decided = self._counted("kvatlas_picker_decision_seconds_count") or 1.0
        seconds = self._counted("kvatlas_picker_decision_seconds_sum")
        yield figure(f"{case}-decision", seconds / decided * 1e3, "ms on average so far")

    def _send(self, case: str, name: str, requests: Sequence[bytes], seconds: float) -> list[float]:
        address = self._envoys[name].address
        if case == "open-100":
            return self._loop.run_until_complete(open_loop(address, requests, 100.0, seconds))
        connections = 2 if case == "large" else 8
        return self._loop.run_until_complete(closed_loop(address, requests, connections, seconds))

    def _stream(self) -> Iterator[dict[str, Any]]:
        """CPU of the picker per piece of a token stream: not looked at, and through the observing filter."""
        request = [post("/stream", b'{"model": "sim-model", "prompt": "x"}')]
        for name, envoy in (("picker", "unobserved"), ("observed", "picker")):
            address = self._envoys[envoy].address
            self._loop.run_until_complete(closed_loop(address, request, 4, 1.0))
            before = self._cpu()
            taken = self._loop.run_until_complete(closed_loop(address, request, 4, self._args.seconds))
            spent = (self._cpu() - before) * 1e3
            yield figure(f"stream-{name}-cpu", spent / len(taken) / 100, "ms/chunk")

    def _shared(self) -> Iterator[dict[str, Any]]:
        """How late the decisions of a picker under 100 requests/s count at a second one."""
        second, telemetry = self._start_picker()
        bodies = [json.dumps({"model": _MODEL, "prompt": prompt, "max_tokens": 1}).encode() for prompt in self._prompts]
        requests = [post("/v1/completions", body) for body in bodies]
        name = "kvatlas_picker_sharing_seconds"
        try:

            def heard() -> bool:
                self._send("open-100", "picker", requests, 1.0)
                return self._counted(f"{name}_count", telemetry) > 0

            self._until(heard, "the second picker hears of the first one's decisions")
            known = (f"{name}_count", f"{name}_sum", f'{name}_bucket{{le="{_SHARED_SECONDS}"}}')
            before = [self._counted(one, telemetry) for one in known]
            self._send("open-100", "picker", requests, self._args.seconds)
            time.sleep(1.0)  # the last ones are on their way
            count, total, soon = (self._counted(one, telemetry) - at for one, at in zip(known, before, strict=True))
        finally:
            second.terminate()
            second.wait(time.monotonic() + 10)
        yield figure("shared", total / max(count, 1.0) * 1e3, "ms on average")
        yield figure("shared-in-50-ms", soon / max(count, 1.0), "share of decisions")
        yield figure("shared-heard", count, "decisions")

    def _counted(self, name: str, telemetry: str = "") -> float:
        """Return the sum of a metric of the picker, or of the one whose metrics are there."""
        with urllib.request.urlopen(f"http://{telemetry or self._telemetry}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def _cpu(self, name: str = "picker") -> float:
        """Seconds of CPU that the process behind an Envoy has used; none for the one alone."""
        assert self._picker is not None
        assert self._floor is not None
        if name == "alone":
            return 0.0
        process = self._floor if name == "floor" else self._picker.process
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def _figures(rounds: Sequence[Sequence[float]], seconds: float) -> dict[str, float]:
    """Return the medians over rounds of a round's figures."""

    def median(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2]

    ordered = [sorted(one) for one in rounds]
    return {
        "rate": median([len(one) / seconds for one in ordered]),
        "p50": median([one[len(one) // 2] for one in ordered]),
        "p99": median([one[min(int(len(one) * 0.99), len(one) - 1)] for one in ordered]),
    }
