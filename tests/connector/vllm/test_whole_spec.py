"""Our whole OffloadingSpec in vLLM: a promise is kept, a failure is said, and every number is on vLLM's pages."""

# vLLM is only in the environment that make test-vllm builds, and these tests are collected without it too.
# ruff: noqa: PLC0415

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


def damage(root: Path) -> int:
    """Flip a bit in every third file and cut every third; returns how many."""
    paths = sorted(root.rglob("*.kv"))
    for number, path in enumerate(paths):
        if number % 3 == 0:
            data = bytearray(path.read_bytes())
            data[-1 - number % 4000] ^= 8
            path.write_bytes(data)
        elif number % 3 == 1:
            os.truncate(path, 6000)
    return len(paths)


def test_a_promised_block_is_verified_and_a_failed_load_is_never_a_success(tmp_path: Path) -> None:
    """With damaged files and failing reads, a HIT always has its bytes in host memory and every request ends."""
    from tests.connector.vllm.fleet import Runner, Witness, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path, whole_spec=True, distrust_seconds=0.05)
    runner = Runner(scheduler)
    witness = Witness(runner)
    runner.run(prompts(11, 300))
    runner.files.drain()
    assert damage(tmp_path / "root") > 100
    number = itertools.count()
    read = os.preadv

    def flaky(fd: int, buffers: object, offset: int) -> int:
        if next(number) % 4 == 0:
            raise OSError(errno.EIO, "injected")
        return read(fd, buffers, offset)

    runner.files._fs.preadv = flaky
    runner.run(prompts(12, 600))
    counts = runner.files.metrics.counts
    assert witness.promised > 500
    assert witness.loaded > 100
    assert witness.failed > 20
    assert counts["corrupt"] > 10
    assert counts["failed"] > 5
    scheduler.shutdown()


def test_thousands_of_requests_with_eviction_over_the_whole_spec(tmp_path: Path) -> None:
    """2,000 requests over small tiers: what is evicted is computed again, what is promised is right."""
    from tests.connector.vllm.fleet import Runner, Witness, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path, whole_spec=True, max_bytes=120 * 20_480, blocks_per_file=3)
    runner = Runner(scheduler)
    witness = Witness(runner)
    runner.run(prompts(13, 2000))
    counts = runner.files.metrics.counts
    assert runner.loaded > 500
    assert counts["hits"] > 200
    assert counts["evicted"] > 50
    assert counts.get("corrupt", 0) == 0
    assert witness.loaded == counts["hits"]
    assert runner.files.used_bytes <= 120 * 20_480
    scheduler.shutdown()


def test_the_numbers_are_vllms_connector_stats(tmp_path: Path) -> None:
    """Hits, misses, bytes and queue depths reach vLLM's own Prometheus page, each growth counted once."""
    from prometheus_client import REGISTRY
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm

    from tests.connector.vllm.fleet import Runner, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path)
    runner = Runner(scheduler)
    page = KVConnectorProm(scheduler.vllm_config, ["engine"], {0: ["0"]})

    runner.run(prompts(14, 400))
    runner.files.drain()
    last = scheduler.connector.get_kv_connector_stats()
    assert len(runner.stats) > 50
    for stats in [*runner.stats, *([last.to_dict()] if last is not None else [])]:
        page.observe(stats)
    now = runner.files.metrics.snapshot()

    def shown(name: str) -> float | None:
        return REGISTRY.get_sample_value(f"vllm:kvatlas_file_{name}", {"engine": "0"})

    assert now["hits"] > 50
    assert shown("hits_total") == now["hits"]
    assert shown("store_bytes_total") == now["file_store_bytes"]
    assert shown("load_bytes_total") == now["file_load_bytes"]
    assert shown("load_seconds_total") == pytest.approx(now["file_load_seconds"])
    assert shown("queued_reads") == 0
    assert shown("queued_writes") == 0
    assert shown("used_bytes") == runner.files.used_bytes
    scheduler.shutdown()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({}, "root_dir is missing"), ({"root_dir": "/x", "secondary_tiers": [{"type": "y"}]}, "secondary_tiers yourself")],
)
def test_a_configuration_that_cannot_work_is_refused(extra: dict, reason: str) -> None:
    """A missing folder and two ways to name tiers are errors that say what to do."""
    from kvatlas.bridge.errors import SettingsError
    from kvatlas.connector.vllm.spec import with_file_tier

    with pytest.raises(SettingsError, match=reason):
        with_file_tier(extra)
