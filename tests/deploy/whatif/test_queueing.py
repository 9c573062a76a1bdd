"""The queueing model: times that can be worked out by hand, and policies on made-up sessions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.whatif.fleet import Arrival
from kvatlas.deploy.whatif.queueing import Engine, Request, Simulation, at_load, requests_of, shared_bound
from kvatlas.deploy.whatif.routers import ROUTERS, Knobs, RoundRobinPod, router, split

ENGINE = Engine(
    tokens_per_second=1_000,
    overhead_seconds=0.0,
    step_seconds=0.01,
    step_request_seconds=0.0,
    prefill_share=0.0,
    capacity_blocks=100,
    block_tokens=10,
)


def sessions(count: int, turns: int, seed: int = 1) -> list[Request]:
    """Conversations that each grow by two blocks a turn, started one after the other."""
    rng = random.Random(seed)
    found = []
    for session in range(count):
        for turn in range(turns):
            blocks = [0, *(session * 1_000 + number for number in range(1, 3 * (turn + 1)))]
            found.append((session * 0.11 + turn * 2.0 + rng.random() * 0.1, blocks))
    found.sort()
    return [Request(n, at, blocks, len(blocks) * 10, 20) for n, (at, blocks) in enumerate(found)]


def test_prompts_wait_for_each_other_and_find_what_the_one_before_left() -> None:
    requests = [Request(0, 0.0, (1, 2), 20, 1), Request(1, 0.0, (1, 2, 3), 30, 1), Request(2, 0.0, (9,), 10, 1)]
    result = Simulation(ENGINE, 1).run(requests, RoundRobinPod(Knobs(ENGINE, 1)))
    assert result.first_token == pytest.approx([0.02, 0.03, 0.04])
    assert (result.hit_tokens, result.prompt_tokens) == (20, 60)


def test_place_in_the_batch_is_waited_for() -> None:
    engine = ENGINE._replace(most_running=1)
    requests = [Request(0, 0.0, (1,), 10, 100), Request(1, 0.0, (2,), 10, 1)]
    result = Simulation(engine, 1).run(requests, RoundRobinPod(Knobs(engine, 1)))
    assert result.first_token == pytest.approx([0.01, 1.02])


def test_times_of_one_moment_are_spread_up_to_the_next() -> None:
    arrivals = [Arrival(0.0, (1,)), Arrival(0.0, (2,)), Arrival(3_000.0, (3,), 0, "", 7, 5)]
    found = requests_of(arrivals, 10)
    assert [one.at for one in found] == [0.0, 1.5, 3.0]
    assert (found[0].tokens, found[2].tokens, found[2].output_tokens) == (10, 7, 5)


def test_load_is_what_was_asked_for() -> None:
    requests = sessions(40, 4)
    stretched = at_load(requests, ENGINE, 4, 0.5)
    work = sum(one.tokens for one in requests) * (1 - shared_bound(requests, ENGINE, 4)) / 1_000
    assert stretched[-1].at == pytest.approx(work / 4 / 0.5, rel=0.01)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_every_policy_serves_all_and_none_beats_the_bound(name: str, replicas: int) -> None:
    requests = at_load(sessions(40, 5), ENGINE, 4, 0.7)
    result = Simulation(ENGINE, 4).run(requests, router(name, Knobs(ENGINE, 4, replicas=replicas)))
    assert sum(result.requests) == len(requests)
    assert all(seconds > 0 for seconds in result.first_token)
    assert result.hit_tokens / result.prompt_tokens <= shared_bound(requests, ENGINE, 4) + 1e-9


def test_our_cost_beats_load_alone_chance_and_the_published_formulas() -> None:
    engine = ENGINE._replace(
        tokens_per_second=50_000, block_tokens=500, step_request_seconds=0.0004, capacity_blocks=400
    )
    grown = [one._replace(tokens=one.tokens * 50, output_tokens=100) for one in sessions(120, 6)]
    requests = at_load(grown, engine, 4, 0.8)

    def mean(name: str) -> float:
        result = Simulation(engine, 4).run(requests, router(name, Knobs(engine, 4)))
        return sum(result.first_token)

    ours = mean("kvatlas")
    assert ours < min(mean(name) for name in ("load-only", "random", "round-robin", "dynamo", "llm-d"))


def test_command_prints_a_row_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * n, "input_length": 1024, "output_length": 8, "hash_ids": [n % 5, 100 + n % 5]}
        for n in range(50)
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["whatif", "--queueing", "--trace", str(trace), "--pods", "2", "--json", "kvatlas:2", "llm-d"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["policy"], row["replicas"]) for row in rows] == [("kvatlas", 2), ("llm-d", 1)]
    assert all(row["p50_ms"] <= row["p99_ms"] for row in rows)


@pytest.mark.parametrize("name", ["nobody", "kvatlas:0", "kvatlas:x"])
def test_wrong_policy_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=name.partition(":")[0]):
        split(name)
