"""`kvatlas doctor` over running parts: all in order, then one thing after the other taken away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvatlas.bridge.model.topics import EVENTS, TOPICS, changelog_topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.doctor.findings import CHECKS, Finding
from kvatlas.deploy.doctor.log import judge_log, look_at_log
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import ServedFleet
from kvatlas.scorer.tokenization.options import TokenizerSettings
from tests.integration.pipeline_support import Service

MODELS = f"sim-model={Path(__file__).parents[1] / 'data' / 'tokenizer'}"


@pytest.fixture
def served() -> Iterator[ServedFleet]:
    """Two simulated engines that serve."""
    fleet = Fleet(SimPlan(pods=2), clock=time.time, monotonic=time.monotonic)
    fleet.start()
    engines = ServedFleet(fleet, TokenizerSettings(models=[MODELS]))
    engines.start()
    try:
        yield engines
    finally:
        engines.close()
        fleet.close()


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """Return check -> states of what the doctor printed."""
    found: dict[str, set[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        finding = json.loads(line)
        found.setdefault(finding["check"], set()).add(finding["state"])
    return found


def test_a_whole_system_is_in_order_until_an_engine_goes(
    served: ServedFleet, brokers: str, topic_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines given by their API alone: tokens are equal, the probe is predicted exactly; exit code 0, then 1."""
    urls = [f"http://{address}" for address in served.addresses.values()]
    flags = [word for url in urls for word in ("--engine", url)]
    tokenizer = ("--tokenizer-models", MODELS)
    kafka = [f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=2"]
    up = Service(
        tmp_path / "up.log", "up", *kafka, *flags, f"--state-dir={tmp_path}", "--scorer-listen=127.0.0.1:0", *tokenizer
    )
    try:
        call = ["doctor", *urls, *kafka, "--scorer", up.ready(180), "--json", "--wait", "90"]
        assert main(call) == 0
        found = states(capsys)
        assert set().union(*found.values()) == {"ok"}, found
        assert set(CHECKS) - set(found) == {"offload", "picker-load"}
        served.stop_pod("pod-1")
        assert main([*call, "--no-probe"]) == 1
        assert states(capsys)["api"] == {"ok", "fail"}
    finally:
        up.close()


async def check_log(kafka: KafkaSettings) -> list[Finding]:
    """Look at the log and judge it."""
    return judge_log(await look_at_log(kafka, "kvatlas", wait_seconds=90))


async def test_the_log_is_looked_at(brokers: str, topic_prefix: str) -> None:
    """Topics that are missing, then workers that are; a broker that is not there."""
    fresh = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=3)
    assert [(found.check, found.state) for found in await check_log(fresh)][-1] == ("topics", "fail")
    declared = {topic.name: topic for topic in (*TOPICS, *changelog_topics("kvatlas"))}
    hasty = {EVENTS: msgspec.structs.replace(declared[EVENTS], retention_hours=1)}
    await ensure_topics(fresh, [*(declared | hasty).values()])
    found = {finding.check: finding for finding in await check_log(fresh)}
    assert {name: finding.state for name, finding in found.items()} == {
        "kafka": "ok", "topics": "ok", "retention": "warn", "rights": "ok", "workers": "fail",
    }  # fmt: skip
    assert "no worker has announced itself" in found["workers"].said
    assert f"{fresh.topic(EVENTS)} keeps 1 h of the 24 h" in found["retention"].said
    loose = KafkaSettings(brokers=brokers, topic_prefix=f"{topic_prefix}loose-", partitions=3)
    await ensure_topics(loose, [msgspec.structs.replace(topic, cleanup="delete") for topic in declared.values()])
    assert [(found.check, found.state) for found in await check_log(loose)][-1] == ("retention", "fail")
    away = KafkaSettings(brokers="127.0.0.1:1")
    assert [(found.check, found.state) for found in await check_log(away)] == [("kafka", "fail")]
