"""`kvatlas top` on a running pipeline: its figures are those of the pods, the workers and the scorers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.traffic import Request
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.integration.pipeline_support import Service, eventually

MODEL = "top-model"

#: What scripts may rely on: field -> type, of the whole and of each kind of row.
CONTRACT: dict[str, dict[str, type | tuple[type, ...]]] = {
    "": {"version": int, "pods": list, "workers": list, "scorers": list, "stores": dict, "unserved": list},
    "pods": {
        "pod": str,
        "state": str,
        "model": str,
        "epoch": int,
        "sequence": int,
        "messages_per_second": float,
        "age_ms": float,
        "lost": int,
        "first_lost": int,
        "last_lost": int,
        "blocks": dict,
        "load": dict,
        "load_age_ms": float,
        "coverage": str,
    },
    "workers": {
        "worker": str,
        "endpoint": str,
        "partitions": list,
        "standby": list,
        "restoring": list,
        "lag_records": int,
        "records_per_second": float,
        "expired": bool,
    },
    "scorers": {
        "scorer": str,
        "up": bool,
        "requests_per_second": float,
        "p50_ms": (float, type(None)),
        "p99_ms": (float, type(None)),
        "errors": float,
        "hit_ratio": (float, type(None)),
        "realised": (float, type(None)),
        "pods": int,
        "unserved": int,
        "disagreements": list,
    },
}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Three pods with two tiers."""
    settings = SimPlan(pods=3, blocks=128, cpu_blocks=64, system_tokens=64, sessions=12, model=MODEL, seed=5)
    made = Fleet(settings, clock=time.time, monotonic=time.monotonic)
    made.start()
    yield made
    made.close()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """Put every service here; whatever still runs at the end is ended."""
    made: list[Service] = []
    yield made
    for service in reversed(made):
        service.close()


def top(*words: str) -> tuple[int, Any]:
    """Run `kvatlas top --once --json`; returns exit code and document."""
    done = subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy", "top", "--once", "--json", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_top_shows_what_pods_workers_and_scorers_do(brokers, topic_prefix, fleet, services, tmp_path):
    """Blocks per pod and tier are the pods' own; rates, latency and hits the scorer's; the JSON keeps its fields."""
    flags = [f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=4"]
    telemetry = f"127.0.0.1:{free_ports(1)[0]}"
    for name, words in (
        ("worker", [f"--state-dir={tmp_path / 'state'}", "--listen=127.0.0.1:0"]),
        ("bridge", [f"--engines={engine}" for engine in fleet.engines]),
        (
            "scorer",
            ["--listen=127.0.0.1:0", f"--telemetry-listen={telemetry}", "--outcome-delay-ms=100"],
        ),
    ):
        services.append(Service(tmp_path / f"{name}.log", name, *flags, *words))
        if name == "scorer":
            telemetry = words[1].partition("=")[2]
    services[0].ready()
    services[1].ready()
    address = services[2].ready()
    requests = fleet.serve(60)

    words = [*flags, f"--scorer-metrics={telemetry}"]
    held = {pod: {tier: len(keys) for tier, keys in tiers.items() if keys} for pod, tiers in fleet.truth().items()}

    def differs() -> Any:
        document = top(*words, "--every=0.1")[1]
        shown = {pod["pod"]: pod["blocks"] for pod in document["pods"]}
        return None if shown == held else shown

    assert not (found := eventually(differs)), (found, held)
    with ScorerClient(address) as client:
        for number, request in enumerate(requests[-20:]):
            tokens = [*request.tokens, *request.output]
            answer = client.score(MODEL, tokens=tokens, cache_salt=request.cache_salt, request_id=f"r-{number}")
            if answer.scores:
                best = max(answer.scores, key=lambda pod: answer.scores[pod].score)
                client.call("ReportDecision", pb.ReportDecisionRequest(request_id=f"r-{number}", pod=best))
    assert not eventually(lambda: not top(*words, "--every=0.1")[1]["scorers"][0]["hit_ratio"])
    with asking(address, requests[-1]):
        code, document = top(*words, "--every=2")
    assert code == 0
    assert document["version"] == 1
    for name, contract in CONTRACT.items():
        for row in [document] if not name else document[name]:
            assert row.keys() == contract.keys()
            for field, kind in contract.items():
                assert isinstance(row[field], kind), (name, field, row[field])
    assert [(row["partitions"], row["lag_records"]) for row in document["workers"]] == [([0, 1, 2, 3], 0)]
    scorer = document["scorers"][0]
    assert (scorer["up"], scorer["pods"], scorer["unserved"], scorer["errors"]) == (True, 3, 0, 0.0)
    # Decisions on prompts that share a beginning count on each other's blocks, which the pods never got.
    assert 0.8 <= scorer["hit_ratio"] <= 1
    assert 0.8 <= scorer["realised"] <= 1
    assert 0 < scorer["p50_ms"] <= scorer["p99_ms"]
    assert scorer["requests_per_second"] > 0

    code, shown = watched("1 scorers", "top", "--every=0.2", *words)
    assert code == 0, shown
    assert "1 scorers" in shown

    services[2].signal(signal.SIGTERM)
    assert services[2].wait() == 0
    code, document = top(*words, "--every=0.1")
    assert code == 1, "a scorer that is named and does not answer is worth an exit code"
    assert [row["up"] for row in document["scorers"]] == [False]
    done = subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy", "top", "--once", "--every=0.1", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "does not answer" in done.stdout
    assert all(pod in done.stdout for pod in held)


def watched(text: str, *words: str) -> tuple[int, str]:
    """Run a command on a terminal until it shows a text, then press Ctrl-C; returns exit code and what was shown."""
    ours, theirs = pty.openpty()
    live = subprocess.Popen(
        [sys.executable, "-m", "kvatlas.deploy", *words], stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown, deadline = "", time.monotonic() + 120
    try:
        while text not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 65536).decode(errors="replace")
        live.send_signal(signal.SIGINT)
        drained = threading.Thread(target=_drain, args=(ours,), daemon=True)
        drained.start()
        return live.wait(60), shown
    finally:
        live.kill()
        live.wait()
        os.close(ours)


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


@contextlib.contextmanager
def asking(address: str, request: Request) -> Iterator[None]:
    """Ask for a score again and again meanwhile."""
    stop = threading.Event()

    def ask() -> None:
        with ScorerClient(address) as client:
            while not stop.wait(0.05):
                client.score(MODEL, tokens=request.tokens, cache_salt=request.cache_salt)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
