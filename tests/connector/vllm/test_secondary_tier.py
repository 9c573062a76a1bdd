"""vLLM's own scheduler over our tier: every block that comes back is byte-equal to what was stored."""

# vLLM is only in the environment that make test-vllm builds, and these tests are collected without it too.
# ruff: noqa: PLC0415

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.events import Limits, Removed, Stored, Tier
from kvatlas.connector.errors import UnsupportedEngineError
from kvatlas.connector.vllm.version import check_version

pytestmark = pytest.mark.vllm

CHILD = """
import sys
from pathlib import Path
from tests.connector.vllm.fleet import Runner, make_scheduler, prompts
runner = Runner(make_scheduler(Path(sys.argv[1]), Path(sys.argv[2]), whole_spec=sys.argv[3] == "True"))
steps = 0
def tell():
    print(runner.files.metrics.counts.get("hits", 0), flush=True)
runner.run(prompts(1, 100000), on_step=tell)
"""


def announced(runner: Any) -> set[int]:
    """Return the blocks that a reader of vLLM's events believes to be in our files."""
    held: set[int] = set()
    for event in runner.events:
        if event.medium == "STORAGE":
            change = held.update if type(event).__name__ == "BlockStored" else held.difference_update
            change(event.block_hashes)
    return held


def test_thousands_of_requests_with_eviction(tmp_path: Path) -> None:
    """3,000 requests over small tiers: no byte is ever different, and the events say exactly what is in the files."""
    from tests.connector.vllm.fleet import Runner, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path, max_bytes=120 * 20_480)
    runner = Runner(scheduler)
    runner.run(prompts(1, 3000))
    counts = runner.files.metrics.counts
    assert runner.loaded > 1000
    assert counts["hits"] > 300
    assert counts["evicted"] > 50
    assert counts.get("corrupt", 0) == 0
    assert runner.files.used_bytes <= 120 * 20_480
    runner.files.drain()
    runner.add([1, 2, 3])  # one more step takes the last events
    runner.run([])
    assert announced(runner) == {int.from_bytes(key[:-4][-8:], "big") for key in runner.files.known()}
    batches = [adapter("vllm")(payload, Limits()) for payload in runner.payloads]
    assert not any(batch.rejected for batch in batches)
    assert {Stored, Removed} == {
        type(event) for batch in batches for event in batch.events if getattr(event, "tier", None) is Tier.DISK
    }
    scheduler.shutdown()


def test_damaged_files_are_computed_again(tmp_path: Path) -> None:
    """Bits flipped and files cut while the engine runs cost hits, never bytes, and no request hangs."""
    from tests.connector.vllm.fleet import Runner, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path)
    runner = Runner(scheduler)
    runner.run(prompts(2, 300))
    runner.files.drain()
    for number, path in enumerate(sorted((tmp_path / "root").rglob("*.kv"))):
        if number % 3 == 0:
            data = bytearray(path.read_bytes())
            data[-1 - number % 4000] ^= 8
            path.write_bytes(data)
        elif number % 3 == 1:
            os.truncate(path, 6000)
    runner.run(prompts(3, 300))
    assert runner.files.metrics.counts["corrupt"] > 10
    scheduler.shutdown()


@pytest.mark.parametrize("whole_spec", [False, True])
def test_kill_and_restart_on_the_same_root(tmp_path: Path, whole_spec: bool) -> None:
    """Kill -9 in the middle; a new engine on the same root loads what was stored, byte-equal."""
    from tests.connector.vllm.fleet import Runner, Witness, make_scheduler, prompts

    project = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "root"), str(tmp_path), str(whole_spec)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
    )  # fmt: skip
    assert child.stdout is not None
    deadline = time.monotonic() + 90
    for line in child.stdout:
        if (line.strip().isdigit() and int(line) > 60) or time.monotonic() > deadline:
            break
    child.send_signal(signal.SIGKILL)
    child.wait(90)
    child.stdout.close()
    scheduler = make_scheduler(tmp_path / "root", tmp_path, whole_spec=whole_spec)
    runner = Runner(scheduler)
    witness = Witness(runner)
    assert runner.files.scanned.wait(90)
    assert len(runner.files.known()) > 50
    runner.run(prompts(4, 400))
    assert runner.files.metrics.counts["hits"] > 50
    assert runner.files.metrics.counts.get("corrupt", 0) == 0
    assert witness.promised > 100
    assert witness.loaded == runner.files.metrics.counts["hits"]
    scheduler.shutdown()


def test_an_unsupported_version_is_named() -> None:
    """Another release is refused with the version found and those supported."""
    with pytest.raises(UnsupportedEngineError, match=r"0\.32\.0.*0\.33"):
        check_version("0.32.0")
    assert check_version("0.33.7") == "0.33.7"


def test_the_whole_spec(tmp_path: Path) -> None:
    """Our OffloadingSpec, loaded by vLLM's factory, brings back what it stored and nothing else."""
    from tests.connector.vllm.fleet import Runner, make_scheduler, prompts

    scheduler = make_scheduler(tmp_path / "root", tmp_path, whole_spec=True)
    runner = Runner(scheduler)
    runner.run(prompts(6, 400))
    assert runner.files.metrics.counts["hits"] > 50
    assert runner.files.metrics.counts.get("corrupt", 0) == 0
    scheduler.shutdown()


def test_our_own_events_decode_with_vllms_structs() -> None:
    """A batch that the connector publishes itself is a KVEventBatch to vLLM."""
    import msgspec
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

    from kvatlas.bridge.model.adapters.fields import encode_batch
    from kvatlas.connector.files.events import BlockMeta, StorageEvents
    from kvatlas.connector.files.holdings import Change

    payloads: list[bytes] = []

    class Sink:
        def publish(self, events, *, timestamp, dp_rank=0):
            payloads.append(encode_batch(timestamp, list(events), dp_rank))
            return 0

    events = StorageEvents(Sink())
    name = bytes(32) + (1).to_bytes(4, "big")
    events.describe({name: BlockMeta(99, parent_hash=98, token_ids=(1, 2), group=1, extra_keys=("salt",))})
    events(Change(False, (name,)))
    events(Change(True, (name,)))
    events.flush()
    stored, removed = msgspec.msgpack.decode(payloads[0], type=KVEventBatch).events
    assert isinstance(stored, BlockStored)
    assert isinstance(removed, BlockRemoved)
    assert (stored.block_hashes, stored.token_ids, stored.medium, stored.locality) == ([99], [1, 2], "STORAGE", "LOCAL")
    assert (removed.block_hashes, removed.medium, removed.group_idx) == ([99], "STORAGE", 1)
