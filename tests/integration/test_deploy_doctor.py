"""`kvatlas doctor` over running parts: all in order, then one thing after the other taken away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.model.topics import TOPICS, changelog_topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.doctor.system import check_log
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimSettings
from kvatlas.deploy.sim.serving import ServedFleet
from kvatlas.scorer.tokenization.options import TokenizerSettings
from tests.integration.pipeline_support import Service

MODELS = f"sim-model={Path(__file__).parents[1] / 'data' / 'tokenizer'}"


@pytest.fixture
def served() -> Iterator[ServedFleet]:
    """Two simulated engines that serve."""
    fleet = Fleet(SimSettings(pods=2), clock=time.time, monotonic=time.monotonic)
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
    served: ServedFleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines given by their API alone: tokens are equal, the probe is predicted exactly; exit code 0, then 1."""
    urls = [f"http://{address}" for address in served.addresses.values()]
    flags = [word for url in urls for word in ("--engine", url)]
    tokenizer = ("--tokenizer-models", MODELS)
    up = Service(
        tmp_path / "up.log", "up", *flags, f"--state-dir={tmp_path}", "--scorer-listen=127.0.0.1:0", *tokenizer
    )
    try:
        call = ["doctor", *urls, "--scorer", up.ready(180), "--skip-kafka", "--json", "--wait", "60"]
        assert main(call) == 0
        found = states(capsys)
        assert set().union(*found.values()) == {"ok"}, found
        assert {"tokens", "probe", "pods", "model-name", "replay-answers", "block-size"} <= set(found)
        served.stop_pod("pod-1")
        assert main([*call, "--no-probe"]) == 1
        assert states(capsys)["api"] == {"ok", "fail"}
    finally:
        up.close()


async def test_the_log_is_looked_at(brokers: str, topic_prefix: str) -> None:
    """Topics that are missing, then workers that are; a broker that is not there."""
    fresh = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=3)
    assert [(found.check, found.state) for found in await check_log(fresh, "kvatlas")][-1] == ("topics", "fail")
    await ensure_topics(fresh, (*TOPICS, *changelog_topics("kvatlas")))
    found = {finding.check: finding for finding in await check_log(fresh, "kvatlas")}
    assert {name: finding.state for name, finding in found.items()} == {
        "kafka": "ok", "topics": "ok", "rights": "ok", "workers": "fail",
    }  # fmt: skip
    assert "no worker has announced itself" in found["workers"].said
    away = KafkaSettings(brokers="127.0.0.1:1")
    assert [(found.check, found.state) for found in await check_log(away, "kvatlas")] == [("kafka", "fail")]
