"""The whole pipeline on a Kafka with TLS, SCRAM and ACLs: each part with the rights of the table and no others."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.model import topics
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.rights import Right
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.integration.pipeline_support import MODEL, PODS, RecordedEngine, Service, eventually, wrong_hits
from tests.integration.secured_support import PREFIX, Accounts, security

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    """A secured node whose accounts have their rights, with the topics made by the account for that."""
    folder = tmp_path_factory.mktemp("secured")
    with KafkaNode(folder / "kafka", security=security()) as node:
        made = Accounts(node, folder)
        for who in ("bridge", "worker", "scorer", "top", "audit", "replay", "at", "diff", "why", "whatif", "topics"):
            made.give(who)
        done = run(made, "topics", "topics")
        assert done.returncode == 0, done.stderr
        yield made


def run(accounts: Accounts, who: str, *words: str, **kafka: str) -> subprocess.CompletedProcess[str]:
    """Run a `kvatlas` command to its end under an account."""
    return subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy", *words, f"--config={accounts.config(who, **kafka)}"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def topic(name: str, *operations: str) -> Right:
    """A right on a topic of the deployment."""
    return Right("topic", PREFIX + name, operations)


@pytest.fixture
def services(accounts: Accounts, tmp_path: Path) -> Iterator[list[Service]]:
    """Put every service here; whatever still runs at the end is ended."""
    made: list[Service] = []
    yield made
    for service in reversed(made):
        service.close()


def start(accounts: Accounts, services: list[Service], folder: Path, who: str, *words: str) -> Service:
    """Start a service under its own account."""
    made = Service(folder / f"{who}.log", who, f"--config={accounts.config(who)}", *flags_of(who, folder), *words)
    services.append(made)
    return made


def flags_of(who: str, folder: Path) -> list[str]:
    """Flags that let a service run beside others on this machine, and a tool end by itself."""
    return {
        "bridge": ["--session-timeout-seconds=6"],
        "worker": [f"--state-dir={folder / 'state'}", "--listen=127.0.0.1:0"],
        "scorer": ["--listen=127.0.0.1:0", "--outcome-delay-ms=200"],
        "top": ["--once"],
        "audit": ["--events"],
        "at": ["latest", "pods"],
    }.get(who, [])


@pytest.fixture
def engines() -> Iterator[list[RecordedEngine]]:
    """The two recorded engines."""
    made = [RecordedEngine(pod) for pod in PODS]
    try:
        yield made
    finally:
        for engine in made:
            engine.close()


def test_the_pipeline_scores_with_the_rights_of_the_table(accounts, services, engines, tmp_path):
    """Recorded engines in, their own cache hits out, and every tool answers, each under its own account."""
    worker = start(accounts, services, tmp_path, "worker")
    bridge = start(
        accounts, services, tmp_path, "bridge", *(engine.flag.replace("engine", "engines") for engine in engines)
    )
    scorer = start(accounts, services, tmp_path, "scorer")
    worker.ready()
    bridge.ready()
    address = scorer.ready()
    for engine in engines:
        engine.play()
    assert not eventually(lambda: wrong_hits(address, engines, tmp_path))
    _report_decision(address)

    top = run(accounts, "top", "top", "--once", "--json", "--every=0.2")
    assert top.returncode == 0, top.stderr
    assert {pod["pod"] for pod in json.loads(top.stdout)["pods"]} == set(PODS)
    replay = run(accounts, "replay", "replay", "--json")
    assert replay.returncode == 0, replay.stderr
    assert len(replay.stdout.splitlines()) > len(engines[0].payloads)
    at = run(accounts, "at", "at", "latest", "pods", "--json")
    assert at.returncode == 0, at.stderr
    assert all(pod in at.stdout for pod in PODS)
    diff = run(accounts, "diff", "diff", "earliest", "latest", "--json")
    assert diff.returncode == 0, diff.stderr
    assert all(pod in diff.stdout for pod in PODS)
    audit = run(accounts, "audit", "audit", "--events", "--json")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    why = eventually_zero(lambda: run(accounts, "why", "why", "secured-1", "--after=0", "--json"))
    assert json.loads(why.stdout)["decision"]["pod"] == PODS[0]
    whatif = run(accounts, "whatif", "whatif", "round-robin", "--decisions", "--json")
    assert whatif.returncode == 0, whatif.stderr
    assert [json.loads(line)["policy"] for line in whatif.stdout.splitlines()][-1] == "round-robin"
    for service in services:
        service.signal(signal.SIGTERM)
        assert service.wait() == 0, service.tail()
        log = service.log.read_text()
        assert "AuthorizationFailed" not in log
        assert "-secret" not in log, "a password is in the log"


def _report_decision(address: str) -> None:
    with ScorerClient(address) as client:
        client.call(
            "ReportDecision",
            pb.ReportDecisionRequest(
                request_id="secured-1", pod=PODS[0], request=score_request(MODEL, tokens=list(range(64)))
            ),
        )


def eventually_zero(call: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """Run a command until it succeeds, for a while."""
    found: list[subprocess.CompletedProcess[str]] = []

    def again() -> bool:
        found[:] = [call()]
        return found[0].returncode != 0

    assert not eventually(again, timeout=60), found[0].stderr
    return found[0]


@pytest.mark.parametrize(
    ("who", "right"),
    [
        ("bridge", topic(topics.EVENTS, "Write")),
        ("bridge", topic(topics.PODS, "Read")),
        ("bridge", Right("group", PREFIX + "kvatlas-bridge", ("Read",))),
        ("worker", topic(topics.BLOCKS, "Write")),
        ("worker", topic("kvatlas-block_index-changelog", "Read")),
        ("worker", Right("group", PREFIX + "kvatlas", ("Read",))),
        ("scorer", topic(topics.WORKERS, "Read")),
        ("scorer", topic(topics.DECISIONS, "Write")),
    ],
)
def test_a_service_without_a_right_says_which(accounts, tmp_path, who, right):
    """It ends at once with exit code 2, and its error names operation and topic or group."""
    accounts.take(who, right)
    try:
        done = run(accounts, who, who, *flags_of(who, tmp_path))
    finally:
        accounts.give(who)
    assert done.returncode == 2, done.stderr
    assert f"it lacks {right}." in done.stderr
    assert f"Kafka account '{who}'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("who", ["bridge", "worker", "scorer", "topics", "top", "replay", "audit", "at"])
def test_a_wrong_password_is_named_as_such(accounts, tmp_path, who):
    """Exit code 2; the error names user, mechanism and the setting that holds the password, never the password."""
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-secret")
    done = run(accounts, who, who, *flags_of(who, tmp_path), sasl_password_file=str(wrong))
    assert done.returncode == 2, done.stderr
    assert f"sasl_username '{who}' with sasl_password_file {wrong}" in done.stderr
    assert "SCRAM-SHA-512" in done.stderr
    assert "not-the-secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("who", "kafka", "words"),
    [
        ("bridge", {"ssl_cafile": ""}, "ssl_cafile is not set"),
        ("worker", {"ssl_cafile": ""}, "ssl_cafile is not set"),
        ("scorer", {"ssl_cafile": ""}, "ssl_cafile is not set"),
        ("scorer", {"ssl_cafile": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ("topics", {"sasl_mechanism": "PLAIN"}, "sasl_mechanism PLAIN"),
        ("top", {"security_protocol": "PLAINTEXT"}, "security_protocol"),
        ("replay", {"sasl_password_file": "/nowhere/password"}, "sasl_password_file /nowhere/password"),
    ],
)
def test_wrong_security_settings_are_named(accounts, tmp_path, who, kafka, words):
    """A CA that is unknown, a file that is missing, another mechanism: the error names the setting."""
    done = run(accounts, who, who, *flags_of(who, tmp_path), **kafka)
    assert done.returncode in (1, 2), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_account_without_rights_gets_nothing(accounts, tmp_path):
    """A service that runs under a stranger's account lists everything it lacks."""
    done = run(accounts, "stranger", "worker", *flags_of("worker", tmp_path))
    assert done.returncode == 2
    assert all(str(right) in done.stderr for right in accounts.rights("worker"))


@pytest.mark.parametrize(
    ("who", "right"),
    [
        ("bridge", topic(topics.EVENTS, "Write")),
        ("worker", topic(topics.BLOCKS, "Write")),
        ("worker", topic(topics.EVENTS, "Read")),
    ],
)
def test_a_right_that_is_taken_away_ends_the_service(accounts, services, engines, tmp_path, who, right):
    """A bridge or worker that Kafka keeps on refusing ends by itself with exit code 2 and the topic's name."""
    bridge = start(accounts, services, tmp_path, "bridge", engines[0].flag.replace("engine", "engines"))
    worker = start(accounts, services, tmp_path, "worker")
    bridge.ready()
    worker.ready()
    refused = {"bridge": bridge, "worker": worker}[who]
    accounts.take(who, right)
    try:
        number, deadline = 0, time.monotonic() + 90
        # One by one, and then on and on: the node hears of the change a little later.
        while refused.process.poll() is None and time.monotonic() < deadline:
            engines[0].play(number, number + 1)
            number = (number + 1) % len(engines[0].payloads)
            time.sleep(0.2)
        assert refused.wait() == 2, refused.tail()
    finally:
        accounts.give(who)
    # Asked for committed offsets, the client says that a topic is refused and not which.
    named = rf"refuses topic ({re.escape(right.name)}|\(it does not say which\)) to {who}"
    assert re.search(named, refused.log.read_text(errors="replace")), refused.tail()
