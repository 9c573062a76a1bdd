"""The catalogue, its page, and the checks of the system and the probe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.engines.facts import EngineFacts, EventSource
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.doctor import probe
from kvatlas.deploy.doctor.engine import EngineSeen, SourceSeen
from kvatlas.deploy.doctor.findings import CHECKS, Finding, exit_code, markdown, page, without_echoes
from kvatlas.deploy.doctor.log import judge_workers
from kvatlas.deploy.doctor.system import judge_pods
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.deploy.doctor.world import worker

PAGE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"


def test_the_page_is_what_the_doctor_says(capsys: pytest.CaptureFixture[str]) -> None:
    """`kvatlas doctor --markdown` prints docs/troubleshooting.md; after a change of a check write it anew."""
    assert main(["doctor", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown() == PAGE.read_text()


def test_every_check_says_what_harm_and_fix() -> None:
    """No empty sentence."""
    assert all(check.about and check.what and check.harm and check.fix for check in CHECKS.values())
    assert {cause for check in CHECKS.values() for cause in check.after} <= set(CHECKS)


def test_a_failure_that_follows_from_another_is_not_counted() -> None:
    """Only from one of its own engine, or of the system."""
    probes = [Finding("probe", "http://h:1", "fail", "0 tokens"), Finding("probe", "http://h:2", "fail", "0 tokens")]
    live = Finding("live", "http://h:1", "fail", "tcp://h:5557")
    assert [found.state for found in without_echoes([live, *probes])] == ["fail", "skip", "fail"]
    assert "(follows from live)" in without_echoes([live, *probes])[1].said
    kafka = Finding("kafka", "Kafka k:1", "fail", "away")
    assert [found.state for found in without_echoes([*probes, kafka])] == ["skip", "skip", "fail"]
    warned = Finding("live", "http://h:1", "warn", "slow")
    assert without_echoes([warned, *probes]) == [warned, *probes]


def test_only_failures_make_the_exit_code() -> None:
    """A warning is shown with its fix and passes."""
    warned = [Finding("replay", "http://h:1", "warn", "none"), Finding("api", "http://h:1", "ok", "vllm")]
    assert exit_code(warned) == 0
    assert CHECKS["replay"].fix in page(warned)
    assert CHECKS["api"].fix not in page(warned)
    assert exit_code([*warned, Finding("kafka", "k", "fail", "away")]) == 1


@pytest.mark.parametrize(
    ("workers", "state", "said"),
    [
        ({}, "fail", "no worker has announced itself"),
        ({"a": worker("a", [0, 1, 2, 3])}, "ok", "1 own all 4"),
        ({"a": worker("a", [0, 1]), "b": worker("b", [2, 3])}, "ok", "2 own all 4"),
        ({"a": worker("a", [0, 1, 3], restoring=[2])}, "fail", "1 of 4 have none: 2"),
    ],
)
def test_partitions_without_an_owner_are_counted(workers: dict[str, bytes], state: str, said: str) -> None:
    """A partition that is being restored has no owner yet."""
    table = WorkerDirectory(time.time_ns)
    for name, value in workers.items():
        table.apply(name.encode(), value)
    finding = judge_workers(table, 4)
    assert finding.state == state
    assert said in finding.said


def seen() -> EngineSeen:
    """Return an engine with one rank."""
    source = EventSource(rank=0, live="tcp://h:1")
    return EngineSeen(
        "http://h:8", EngineFacts(url="http://h:8", engine="vllm", models=("m",)), sources=[SourceSeen(source)]
    )


@pytest.mark.parametrize(
    ("pods", "wrong"),
    [
        ([], {"pods"}),
        ([{"endpoint": "tcp://other:1"}], {"pods"}),
        ([{}], set()),
        ([{"state": "stale"}], {"pods"}),
        ([{"model": "/models/m"}], {"model-name"}),
        ([{"lost": 3}], {"gaps"}),
    ],
)
def test_what_the_scorer_knows_of_an_engine(pods: list[dict[str, Any]], wrong: set[str]) -> None:
    """Unknown, silent, under another name, with holes: each is one finding."""
    infos = [pb.PodInfo(**{"pod": "p", "state": "live", "model": "m", "endpoint": "tcp://h:1"} | pod) for pod in pods]
    found = judge_pods(infos, [seen()])
    assert {finding.check for finding in found if finding.state in ("warn", "fail")} == wrong


@pytest.mark.parametrize(
    ("predicted", "cached", "states"),
    [
        (48, 48, {"usage": "ok", "probe": "ok"}),
        (48, 32, {"usage": "ok", "probe": "fail"}),
        (0, 48, {"usage": "ok", "probe": "fail"}),
        (0, 0, {"usage": "ok", "probe": "warn"}),
        (48, None, {"usage": "warn", "probe": "skip"}),
        (0, None, {"usage": "warn", "probe": "fail"}),
    ],
)
def test_a_prediction_is_judged_by_what_came_of_it(predicted: int, cached: int | None, states: dict[str, str]) -> None:
    """Equal and more than nothing is in order."""
    assert {found.check: found.state for found in probe.judge("u", predicted, cached, 64)} == states


def test_a_probe_is_new_every_time() -> None:
    """Else the first request would find what an earlier run left."""
    assert probe.prompt_text(8) != probe.prompt_text(8)
