"""The what-if model: caches, policies, and figures on arrivals whose outcome is known."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.whatif.fleet import Arrival, PrefixCache
from kvatlas.deploy.whatif.policies import Options, parse
from kvatlas.deploy.whatif.run import read_trace, simulate


def _run(arrivals, policy, pods=2, capacity=100, **options):
    return simulate(
        arrivals,
        policy,
        pods=pods,
        capacity_blocks=capacity,
        block_size_tokens=16,
        options=Options(**options),
        blocks_per_second=1e9,
    )


def test_match_stops_at_the_first_missing_block():
    """A held block behind a hole does not count."""
    cache = PrefixCache(10)
    cache.insert([1, 2, 3])
    cache.drop([2])
    assert cache.match([1, 2, 3]) == 1


def test_eviction_takes_the_tail_first():
    """The last block of the least recent prompt goes first, so that its prefix stays usable."""
    cache = PrefixCache(3)
    cache.insert([1, 2, 3])
    assert cache.insert([9]) == [3]
    assert cache.match([1, 2, 3]) == 2


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=6, unique=True), max_size=30), st.integers(1, 12))
def test_capacity_is_never_passed(prompts, capacity):
    """However prompts come, a cache holds at most its capacity."""
    cache = PrefixCache(capacity)
    for prompt in prompts:
        cache.insert(prompt, output_blocks=1)
        assert len(cache) <= capacity


def test_one_prompt_again_and_again_is_a_hit_but_for_round_robin():
    """Cache-aware policies keep a prompt on its pod; round robin pays once per pod."""
    arrivals = [Arrival(1000.0 * number, (1, 2, 3, 4)) for number in range(10)]
    assert _run(arrivals, "precise").hit_ratio == pytest.approx(0.9)
    assert _run(arrivals, "approximate").hit_ratio == pytest.approx(0.9)
    assert _run(arrivals, "shared").hit_ratio == pytest.approx(0.9)
    assert _run(arrivals, "round-robin").hit_ratio == pytest.approx(0.8)


def test_routers_of_their_own_lose_what_others_placed():
    """Four approximate routers place one prompt up to four times."""
    arrivals = [Arrival(1000.0 * number, (1, 2, 3, 4)) for number in range(40)]
    assert _run(arrivals, "approximate:4", pods=4).hit_ratio < _run(arrivals, "precise:4", pods=4).hit_ratio


def test_precise_does_not_see_what_is_younger_than_the_delay():
    """A burst within the delay spreads as if nothing were cached."""
    arrivals = [Arrival(float(number), (1, 2, 3, 4)) for number in range(4)]
    assert _run(arrivals, "precise", pods=4, delay_ms=1000.0).hit_ratio == 0.0


def test_recorded_follows_the_record():
    """The recorded policy sends each request where it went."""
    arrivals = [Arrival(0.0, (1, 2), 0, "a"), Arrival(1.0, (1, 2), 0, "b"), Arrival(2.0, (1, 2), 0, "a")]
    assert _run(arrivals, "recorded").hit_ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["nearest", "precise:0", "precise:x"])
def test_a_policy_that_does_not_exist_is_named(name):
    """The error repeats what was asked for."""
    with pytest.raises(SettingsError, match=name.split(":")[-1]):
        parse(name)


def test_trace_files_read_plain_and_compressed(tmp_path: Path):
    """Both forms give the same arrivals; a bad line is named by its number."""
    line = json.dumps({"timestamp": 5, "input_length": 1024, "output_length": 600, "hash_ids": [1, 2]})
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write(line + "\n")
    assert list(read_trace(tmp_path / "t.jsonl", 512)) == list(read_trace(tmp_path / "t.jsonl.gz", 512))
    assert list(read_trace(tmp_path / "t.jsonl", 512)) == [Arrival(5, [1, 2], 1, "", 1024, 600)]
    (tmp_path / "bad.jsonl").write_text(line + "\n{}\n")
    with pytest.raises(SettingsError, match="line 2"):
        list(read_trace(tmp_path / "bad.jsonl", 512))


def test_command_prints_one_object_per_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`kvatlas whatif --json` is one line a policy, in the order asked."""
    with (tmp_path / "t.jsonl").open("w") as file:
        for number in range(20):
            request = {
                "timestamp": number * 1000,
                "input_length": 1024,
                "output_length": 1,
                "hash_ids": [0, 1 + number % 4],
            }
            file.write(json.dumps(request) + "\n")
    assert main(["whatif", "precise:2", "round-robin", "--trace", str(tmp_path / "t.jsonl"), "--json"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["precise:2", "round-robin"]
    assert rows[0]["hit_ratio"] > rows[1]["hit_ratio"]
