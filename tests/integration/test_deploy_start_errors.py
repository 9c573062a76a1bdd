"""Services that cannot start: they end soon, with the exit code that says whether trying again helps, and say why."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.pipeline_support import Service


def run(*words: str, timeout: float = 180.0) -> subprocess.CompletedProcess[str]:
    """Run a `kvatlas` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kvatlas.deploy", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.mark.parametrize(
    "words",
    [
        ["scorer"],
        ["topics"],
        ["top", "--once"],
        ["replay"],
        ["audit", "--events"],
        ["reindex", "status"],
        ["whatif", "--decisions"],
    ],
)
def test_no_broker_is_told_with_its_address(words, tmp_path):
    """Exit code 1, since it may come back; the text has the address and what to check, and no traceback."""
    done = run(*words, "--brokers=127.0.0.1:1")
    assert done.returncode == 1
    assert f"kvatlas {words[0]}: no broker answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Unclosed" not in done.stderr


@pytest.mark.parametrize(
    "words", [["top", "--once"], ["reindex", "status"], ["audit", "--events"], ["diff", "-1h", "-1m"]]
)
def test_topics_that_are_not_there_are_named(brokers, topic_prefix, words):
    """A tool with a wrong prefix says so at once, with the topic's name and the fix."""
    done = run(*words, f"--brokers={brokers}", f"--topic-prefix={topic_prefix}")
    assert done.returncode == 1
    assert f"topic {topic_prefix}kv-" in done.stderr
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Unclosed" not in done.stderr


def test_a_pod_that_nobody_knows_is_no_clean_audit(brokers, topic_prefix, tmp_path):
    """A misspelt pod is an error, not a pod without ghosts."""
    flags = [f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=2"]
    worker = Service(tmp_path / "worker.log", "worker", *flags, f"--state-dir={tmp_path / 's'}", "--listen=127.0.0.1:0")
    try:
        worker.ready(90)
        assert run("audit", "--events", *flags).returncode == 0
        done = run("audit", "--events", "--pod=pod-x", *flags)
    finally:
        worker.close()
    assert done.returncode == 2
    assert "--pod pod-x" in done.stderr


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["worker", "--state-dir={folder}"], "--listen"),
        (["worker", "--state-dir={folder}", "--listen=127.0.0.1:0"], "--telemetry-listen"),
        (["scorer"], "--listen"),
        (["scorer", "--listen=127.0.0.1:0"], "--http-listen"),
        (["bridge"], "--listen"),
    ],
)
def test_a_port_that_is_taken_is_named(brokers, topic_prefix, tmp_path, taken, words, flag):
    """Exit code 2 with the address, before anything is served."""
    made = [word.format(folder=tmp_path / "state") for word in words]
    done = run(*made, f"{flag}={taken}", f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=2")
    assert done.returncode == 2, done.stderr
    assert taken in done.stderr
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_broker_s_port_that_is_taken_is_told_at_once(tmp_path, taken):
    """No JVM is started for it."""
    done = run("broker", "start", f"--data-dir={tmp_path / 'kafka'}", f"--port={taken.rpartition(':')[2]}")
    assert done.returncode == 2
    assert f"cannot listen on {taken}" in done.stderr
    assert not (tmp_path / "kafka").exists()


def test_missing_topics_are_listed_when_they_may_not_be_made(brokers, topic_prefix):
    """With create_topics off, the text names the topics and the command that makes them."""
    done = run("bridge", f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--no-create-topics")
    assert done.returncode == 1
    assert f"{topic_prefix}kv-events" in done.stderr
    assert "kvatlas topics" in done.stderr


def test_another_partition_count_is_explained(brokers, topic_prefix):
    """A service whose setting disagrees with the topics ends and names both counts."""
    assert run("topics", f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=2").returncode == 0
    done = run("bridge", f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=4")
    assert done.returncode == 1
    assert "kv-events has 2" in done.stderr
    assert "--partitions" in done.stderr


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("[scorer]\nlistenn = 'x'\n", ["scorer"], "[scorer] listenn"),
        ("[worker]\nprocesses = 0\n", ["worker"], "[worker] processes in the settings file"),
        ("[wroker]\n", ["worker"], "unknown section [wroker]"),
        ("not toml", ["bridge"], "is not TOML"),
        ("", ["bridge", "--buffer-bytes=soon"], "--buffer-bytes"),
        ("", ["bridge", "--linger-ms=3"], "flag --linger-ms is a constant now"),
        ("[worker]\nflush_records = 1\n", ["worker"], "[worker] flush_records in the settings file"),
        ("", ["bridge", "--brokers=kafka"], "'kafka' is not host:port"),
        ("", ["bridge", "--engines=10.0.0.5"], "engine '10.0.0.5'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(tmp_path: Path, file, words, said):
    """Exit code 2, before Kafka is asked for anything."""
    config = tmp_path / "kvatlas.toml"
    config.write_text(file)
    done = run(*words, f"--config={config}")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
