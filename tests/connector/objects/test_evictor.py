"""Eviction of a bucket's prefix: longest unused first, beside engines that go on."""

from __future__ import annotations

import obstore
import pytest

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.objects.client import DeniedError, ObjectStoreError
from kvatlas.connector.objects.evictor import evict_prefix
from kvatlas.connector.objects.settings import ObjectTierSettings
from kvatlas.connector.objects.tier import ObjectTier
from kvatlas.connector.outcome import Outcome
from kvatlas.deploy.cli.entry import main
from tests.connector.conftest import FINGERPRINT, WAIT, block, key, target
from tests.connector.objects.conftest import Bucket, S3Server, refuse

SETTINGS = ObjectTierSettings(url="s3://blocks/prefix")
OBJECT = 4096 + 8192


def test_the_longest_unused_go(bucket: Bucket) -> None:
    """Blocks that an engine used lately stay, and the engine announces the others' end when it asks for them."""
    tier = bucket.tier(usage_seconds=60.0)
    tier.store([block(number) for number in range(10)]).result(WAIT)
    bucket.monotonic += 61
    bucket.now_ns = 4_000_000_000_000_000_000
    tier.touch([key(number) for number in range(5)])
    assert tier.drain(WAIT)
    budget = DiskBudget(max_bytes=8 * OBJECT, max_percent=None, high_watermark=0.9, low_watermark=0.75)
    dry = evict_prefix(SETTINGS, budget, objects=bucket.objects, dry_run=True)
    assert (dry.blocks, dry.used_bytes, dry.evicted_blocks) == (10, 10 * OBJECT, 4)
    report = evict_prefix(SETTINGS, budget, objects=bucket.objects)
    assert (report.evicted_blocks, report.evicted_bytes, report.failed) == (4, 4 * OBJECT, 0)
    found = tier.lookup([key(number) for number in range(10)])
    assert sum(found.values()) == 6
    assert all(found[key(number)] for number in range(5))
    assert bucket.announced() == {name for name, there in found.items() if there}
    again = evict_prefix(SETTINGS, budget, objects=bucket.objects)
    assert again.evicted_blocks == 0


def test_uses_of_writers_long_gone_are_removed(bucket: Bucket) -> None:
    """A writer that wrote no uses for a month leaves none behind."""
    tier = bucket.tier()
    tier.store([block(1)]).result(WAIT)
    tier.close()
    later = 4_000_000_000_000_000_000
    report = evict_prefix(SETTINGS, DiskBudget(max_percent=None), objects=bucket.objects, clock_ns=lambda: later)
    assert report.stale_files == 1
    assert not list(obstore.list(bucket.objects.store, f"{tier.directory}/usage"))


def test_what_cannot_be_listed_is_an_error_and_what_cannot_be_removed_is_counted(bucket: Bucket) -> None:
    """A store without the right to list ends the pass; one that refuses a removal is reported."""
    bucket.tier().store([block(number) for number in range(3)]).result(WAIT)
    budget = DiskBudget(max_bytes=OBJECT, max_percent=None)
    bucket.objects.faults["delete"] = refuse(ObjectStoreError("503"))
    report = evict_prefix(SETTINGS, budget, objects=bucket.objects)
    assert (report.evicted_blocks, report.failed) == (0, 3)
    bucket.objects.faults["list"] = refuse(DeniedError("403"))
    with pytest.raises(LayoutError, match="cannot be listed"):
        evict_prefix(SETTINGS, budget, objects=bucket.objects)


def test_eviction_on_a_server_under_an_engine(s3: S3Server) -> None:
    """An engine's blocks that the evictor took are misses for it, never a load of something else."""
    settings = s3.settings()
    with ObjectTier(settings, FINGERPRINT) as tier:
        tier.store([block(number) for number in range(20)]).result(WAIT)
        budget = DiskBudget(max_bytes=10 * OBJECT, max_percent=None, high_watermark=1.0, low_watermark=1.0)
        assert evict_prefix(settings, budget).evicted_blocks == 10
        outcomes = [tier.load([wanted]).result(WAIT)[wanted.key].outcome for wanted, _ in map(target, range(20))]
    assert outcomes.count(Outcome.LOADED) == outcomes.count(Outcome.MISS) == 10


def test_the_command_evicts_from_a_bucket(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``kvatlas evictor s3://...`` takes its credentials from the environment and says what it did."""
    settings = s3.settings()
    with ObjectTier(settings, FINGERPRINT) as tier:
        tier.store([block(number) for number in range(4)]).result(WAIT)
    for name, value in settings.store.items():
        monkeypatch.setenv("AWS_ENDPOINT_URL" if name == "endpoint" else f"AWS_{name.upper()}", value)
    assert main(["evictor", settings.url, "--max-bytes", str(3 * OBJECT), "--high", "1", "--low", "1"]) == 0
    assert "4 blocks" in (said := capsys.readouterr().out)
    assert "evicted 1 blocks" in said
    assert main(["evictor", settings.url]) != 0
    assert "name --max-bytes" in capsys.readouterr().err
