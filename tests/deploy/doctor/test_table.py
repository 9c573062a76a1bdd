"""The doctor over a system in which one thing is wrong: it names that one and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.deploy.doctor.examine import examine
from kvatlas.deploy.doctor.findings import CHECKS, exit_code, page
from tests.deploy.doctor.world import BLOCK, CLOSED, World, stored, tokens_of, worker


class Wrong(NamedTuple):
    """One misconfiguration: what breaks it, the check that names it, and how."""

    check: str
    state: str
    how: str
    break_it: Callable[[World], object]


def _workers(*records: tuple[str, bytes]) -> WorkerDirectory:
    table = WorkerDirectory(time.time_ns)
    for name, value in records:
        table.apply(name.encode(), value)
    return table


def _set(**changes: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        for name, value in changes.items():
            assert hasattr(world, name)
            setattr(world, name, value)

    return change


def _log(**changes: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        for name, value in changes.items():
            setattr(world.log, name, value)

    return change


def _source(**changes: object) -> Callable[[World], None]:
    return lambda world: world.source.update(changes)


def _pod(**changes: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        assert world.pod is not None
        world.pod |= changes

    return change


def _pod_by_address(world: World) -> None:
    _pod(pod=world.publisher.endpoint.partition("://")[2])(world)


def _also(*changes: Callable[[World], object]) -> Callable[[World], None]:
    def change(world: World) -> None:
        for one in changes:
            one(world)

    return change


def _metrics(old: str, new: str) -> Callable[[World], None]:
    return lambda world: world.metrics(old, new)


def _says(event: dict[str, Any]) -> Callable[[World], None]:
    return lambda world: world.said.append(event)


def _answers(changes: dict[str, Any]) -> Callable[[World], None]:
    return lambda world: world.answers.update(changes)


def _sglang(*version: str, **info: object) -> Callable[[World], None]:
    return lambda world: world.become_sglang(*version, **info)


def _picker(old: str, new: str) -> Callable[[World], None]:
    return lambda world: setattr(world, "picker", world.picker.replace(old, new))


#: What the probe of a system sees in which the engine's events do not arrive.
_DEAF = _set(short=BLOCK, pod=None)
TABLE = [
    Wrong("api", "fail", "nobody there", _set(urls=["http://127.0.0.1:1"])),
    Wrong("events", "fail", "events off", _also(_set(short=BLOCK), _answers({"/kv_event_sources": {}}))),
    Wrong("events", "fail", "off in SGLang", _also(_set(short=BLOCK), _sglang(kv_events=None))),
    Wrong("block-size", "fail", "24 in SGLang", _also(_set(short=BLOCK), lambda world: world.become_sglang(pages=24))),
    Wrong("load", "warn", "no metrics in SGLang", _also(_sglang(), _metrics("sglang:num_running_reqs 0.0", ""))),
    Wrong("live", "fail", "port closed", _also(_DEAF, _source(endpoint=CLOSED))),
    Wrong("replay", "warn", "no socket", _source(replay_endpoint=None)),
    Wrong("replay-answers", "fail", "port closed", _also(_set(connect_seconds=3.0), _source(replay_endpoint=CLOSED))),
    Wrong("topic", "warn", "another form", _also(_source(topic="kv-events"), _pod_by_address)),
    Wrong("block-size", "fail", "24 and 16", _also(_set(short=BLOCK), _metrics('="16"', '="24"'))),
    Wrong("prefix-caching", "fail", "off", _also(_set(short=BLOCK), _metrics('"True"', '"False"'))),
    Wrong("prefix-caching", "fail", "off in SGLang", _sglang(disable_radix_cache=True)),
    Wrong("sequence", "fail", "no message", _set(said=[], wait_seconds=1.0)),
    Wrong("sequence", "fail", "messages missing", _set(holes=True)),
    Wrong("clock", "warn", "a minute ahead", _set(clock=60.0)),
    Wrong("readable", "fail", "text for tokens", _also(_set(short=BLOCK), _says(stored(token_ids="x")))),
    Wrong("offload", "warn", "placeholders", _says(stored(medium="CPU", token_ids=[], block_size=0))),
    Wrong("salts", "warn", "vLLM 0.16", _answers({"/version": {"version": "0.16.2"}})),
    Wrong("adapters", "warn", "SGLang 0.5.22", _sglang("0.5.22")),
    Wrong(
        "speculation",
        "warn",
        "EAGLE in vLLM",
        _also(_set(recomputed=BLOCK), _metrics("vllm:num", "vllm:spec_decode_num_drafts_total 1\nvllm:num")),
    ),
    Wrong("speculation", "warn", "EAGLE without pairs", _sglang(speculative_algorithm="EAGLE")),
    Wrong("hybrid", "warn", "kinds not told", _says(stored(group_idx=1))),
    Wrong("load", "warn", "no figures", _metrics("vllm:num_requests_running", "vllm:something")),
    Wrong("kafka", "fail", "away", _also(_set(short=BLOCK), _log(away="no broker answers"))),
    Wrong("topics", "fail", "missing", _also(_set(short=BLOCK), _log(topics="topics kv-pods do not exist"))),
    Wrong("retention", "fail", "not compacted", _log(policy="topic kv-pods has cleanup.policy=delete")),
    Wrong("retention", "warn", "an hour", _log(configs={topics.EVENTS: {"retention.ms": "3600000"}})),
    Wrong("retention", "warn", "by size", _log(configs={topics.EVENTS: {"retention.bytes": "1000000"}})),
    Wrong("rights", "fail", "lacking", _log(rights="it lacks Read on topic kv-pods")),
    Wrong("workers", "fail", "none", _also(_set(short=BLOCK, partial=True), _log(workers=_workers()))),
    Wrong(
        "workers",
        "fail",
        "restoring",
        _also(_set(partial=True), _log(workers=_workers(("w", worker("w", [0, 1, 3], restoring=[2]))))),
    ),
    Wrong("lag", "fail", "nothing moves", _also(_set(short=BLOCK), _log(behind={"pod-a": 9}, still={"pod-a": 9}))),
    Wrong("lag", "warn", "behind", _log(behind={"w": 9000}, still={"w": 700})),
    Wrong("lag", "fail", "records gone", _log(taken={"w": 5})),
    Wrong("scorer", "fail", "a partition is silent", _set(short=BLOCK, partial=True)),
    Wrong("pods", "fail", "unknown", _set(pod=None, short=BLOCK)),
    Wrong("pods", "fail", "silent", _pod(state="stale")),
    Wrong("model-name", "fail", "a path", _also(_set(short=BLOCK), _pod(model="/models/m"))),
    Wrong("model-name", "warn", "another served name", _set(names={"m"})),
    Wrong("gaps", "warn", "lost", _pod(lost=3)),
    Wrong("picker-load", "warn", "stale", _picker("stale_endpoints 0", "stale_endpoints 1")),
    Wrong("picker-load", "fail", "none ready", _picker("2.0", "0.0")),
    Wrong("picker-load", "fail", "no picker", _set(picker="up 1.0\n")),
    Wrong(
        "tokens",
        "fail",
        "another tokenizer",
        _also(_set(short=BLOCK, mine=(lambda text: tokens_of(text)[1:], tokens_of))),
    ),
    Wrong("template", "fail", "another template", _set(mine=(tokens_of, lambda text: [1, *tokens_of(text)]))),
    Wrong(
        "template",
        "fail",
        "a template that trims",
        _set(mine=(tokens_of, lambda text: tokens_of(text.replace(" How many? ", "How many?")))),
    ),
    Wrong("probe", "fail", "predicted too little", _set(short=BLOCK)),
    Wrong("usage", "warn", "not told", _set(usage=False)),
]


@pytest.fixture
def world() -> Iterator[World]:
    """A system in order, on ports of its own."""
    publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@pod-a@m")
    publisher.start()
    yield World(publisher)
    publisher.close()


async def test_a_system_in_order_has_nothing_to_fix(world: World) -> None:
    """Every check that can be made is made, and is in order."""
    with world.examined() as what:
        found = await examine(what)
    assert [finding for finding in found if finding.state not in ("ok", "skip")] == []
    assert set(CHECKS) - {finding.check for finding in found if finding.state == "ok"} == {"offload"}
    assert exit_code(found) == 0


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: f"{wrong.check}, {wrong.how}")
async def test_one_thing_that_is_wrong_is_named_alone(world: World, wrong: Wrong) -> None:
    """With the fix on the page; only what fails makes the exit code."""
    wrong.break_it(world)
    with world.examined() as what:
        found = await examine(what)
    assert {(finding.check, finding.state) for finding in found if finding.state in ("warn", "fail")} == {
        (wrong.check, wrong.state)
    }
    assert CHECKS[wrong.check].fix in page(found)
    assert exit_code(found) == (wrong.state == "fail")


async def test_a_pod_that_its_endpoint_names_needs_no_topic(world: World) -> None:
    """The scorer knows it by a name, as Kubernetes or ``pod=`` give it."""
    _source(topic="")(world)
    with world.examined() as what:
        found = await examine(what)
    assert [finding for finding in found if finding.state not in ("ok", "skip")] == []


async def test_speculation_that_predictions_know_of_is_in_order(world: World) -> None:
    """An engine that computes the last matched block again, and a scorer that says so."""
    world.recomputed = world.short = BLOCK
    world.metrics("vllm:num", "vllm:spec_decode_num_drafts_total 1\nvllm:num")
    with world.examined() as what:
        found = await examine(what)
    assert [finding for finding in found if finding.state not in ("ok", "skip")] == []
    assert [finding.state for finding in found if finding.check == "speculation"] == ["ok"]


async def test_a_scorer_that_is_away_is_named_alone(world: World) -> None:
    """Nothing is said of what only it could tell."""
    world.refused = "connection refused"
    with world.examined() as what:
        found = await examine(what)
    assert {finding.check for finding in found if finding.state in ("warn", "fail")} == {"scorer"}


def test_the_table_has_every_check() -> None:
    """A new check needs a system in which it is the one that speaks."""
    assert {wrong.check for wrong in TABLE} == set(CHECKS)
