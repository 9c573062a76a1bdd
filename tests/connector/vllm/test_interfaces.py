"""What vLLM 0.33 asks of a tier beside transfers: filters, sources of hits, resets, info labels, idle steps."""

# vLLM is only in the environment that make test-vllm builds, and these tests are collected without it too.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start runners over one folder, each with host memory of its own."""
    from tests.connector.vllm.fleet import Runner, make_scheduler

    made: list[Any] = []

    def begin(root: Path | str = tmp_path / "root", **tier: Any) -> Any:
        made.append(make_scheduler(root, tmp_path, **tier))
        return Runner(made[-1])

    yield begin
    for scheduler in made:
        scheduler.shutdown()


def hits(runner: Any) -> float:
    """Return how many blocks the tier brought."""
    return float(runner.files.metrics.counts.get("hits", 0))


@pytest.mark.parametrize(
    ("allowed", "served"),
    [
        ([{"medium": "STORAGE"}], True),
        ([{"medium": "STORAGE", "locality": "LOCAL"}], True),
        ([{"locality": "REMOTE"}], False),
        ([{"medium": "CPU"}], False),
        ([], False),
        ([{"medium": "cpu"}, {"medium": "storage"}], True),
    ],
)
def test_a_request_says_which_tiers_may_serve_it(start: Start, allowed: list[dict[str, str]], served: bool) -> None:
    """``kv_load_tiers`` of a request lets it load from our tier, or keeps it from that."""
    from tests.connector.vllm.fleet import prompts

    first = start()
    first.run(prompts(31, 60))
    first.files.drain()
    second = start()
    for prompt in prompts(31, 20):
        second.add(prompt, kv_load_tiers=allowed)
    second.run([])
    assert (hits(second) > 0) is served


@pytest.mark.parametrize(("locality", "source"), [("LOCAL", "disk"), ("REMOTE", "external_unspecified")])
def test_hits_name_their_source(start: Start, locality: str, source: str) -> None:
    """Tokens that came from our tier are counted as disk, or as a remote store's; what host memory held, as host."""
    from tests.connector.vllm.fleet import prompts

    first = start(locality=locality)
    first.run(prompts(32, 60))
    first.files.drain()
    second = start(locality=locality)
    found: Counter[str] = Counter()
    plain = second.scheduler.connector.get_external_cache_hit_sources

    def watched(request: Any, tokens: int) -> Any:
        sources = plain(request, tokens)
        for name, count in (sources or {}).items():
            found[name.value] += count
        return sources

    second.scheduler.connector.get_external_cache_hit_sources = watched
    second.run(prompts(32, 60))
    assert hits(second) > 0
    assert found[source] > 0
    assert set(found) <= {source, "host"}


def test_a_reset_in_the_middle_gives_no_wrong_bytes(start: Start) -> None:
    """Prefix cache and connector are reset while blocks move; what files hold serves again after the flush."""
    from tests.connector.vllm.fleet import Witness, prompts

    runner = start()
    witness = Witness(runner)
    steps = 0
    resets = 0

    def now_and_then() -> None:
        nonlocal steps, resets
        steps += 1
        if steps % 40 == 0:
            runner.scheduler.reset_prefix_cache(reset_running_requests=False, reset_connector=True)
            resets += 1

    runner.run(prompts(33, 600), on_step=now_and_then)
    assert resets > 5
    assert hits(runner) > 50
    assert witness.promised > 50
    before = hits(runner)
    runner.scheduler.reset_prefix_cache(reset_connector=True)
    runner.run(prompts(33, 60))
    assert hits(runner) > before


def test_an_idle_engine_steps_until_its_events_are_out(start: Start) -> None:
    """What is evicted while no request runs is published by a step of its own, and then the engine rests."""
    from tests.connector.vllm.fleet import prompts

    runner = start()
    runner.run(prompts(34, 40))
    runner.files.drain()
    while runner.scheduler.has_requests():
        runner.step()
    removed = len([event for event in runner.events if event.medium == "STORAGE"])
    runner.files.evict(list(runner.files.known())[:5])
    assert runner.scheduler.has_requests()
    while runner.scheduler.has_requests():
        runner.step()
    assert len([event for event in runner.events if event.medium == "STORAGE"]) > removed


def test_the_info_metric_says_what_the_tier_is(start: Start, tmp_path: Path) -> None:
    """Our labels stand in vLLM's ``kv_offload_config_info``, declared by name before any engine runs."""
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    runner = start()
    extra = runner.scheduler.vllm_config.kv_transfer_config.kv_connector_extra_config
    names = TieringOffloadingSpec.config_info_keys(extra)
    info = runner.manager.config_info()[1]
    assert set(info) <= set(names)
    assert info["kvatlas_kind"] == "file"
    assert info["kvatlas_root"] == str(tmp_path / "root")
    assert info["kvatlas_fingerprint"] == runner.files.fingerprint.directory()
    assert info["kvatlas_writable"] is True


def test_blocks_in_a_bucket(start: Start, s3: Any) -> None:
    """Two engines over one bucket: the second loads what the first stored, byte-equal, and says so in its numbers."""
    from tests.connector.vllm.fleet import Witness, prompts

    settings = s3.settings()
    options = {"store": dict(settings.store), "threads": 4}
    first = start(settings.url, **options)
    first.run(prompts(35, 100))
    first.files.drain()
    second = start(settings.url, **options)
    witness = Witness(second)
    second.run(prompts(35, 100))
    assert hits(second) > 50
    assert witness.loaded == hits(second)
    assert second.manager.config_info()[1]["kvatlas_locality"] == "REMOTE"
    assert "corrupt" not in second.files.metrics.counts
    shown = [stats for stats in map(str, second.stats) if "vllm:kvatlas_file_load_bytes" in stats]
    assert shown
