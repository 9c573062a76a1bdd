"""`kvatlas at` and `kvatlas diff` against a real Kafka: past states equal what a fold of the same messages gives."""

import asyncio
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import read_records, read_topic
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import EARLIEST, LATEST, Moment
from kvatlas.deploy.history.rebuild import PastIndex, rebuild
from kvatlas.streams.index.apply import is_meta
from kvatlas.streams.index.holders import holders
from kvatlas.streams.resolve.resolver import ResolveOptions
from kvatlas.streams.state.changelog import META_KEY, decode_meta
from tests.integration.streams_support import WorkerProcess, assert_true, fleet_of, make_topics, producing, until_true

from .test_deploy_replay import BEGAN, DATA, PARTITIONS, log  # noqa: F401 - the fixture

OPTIONS = ResolveOptions(block_size_tokens=16)


def questions(path: Path, pod: str) -> list[int]:
    """Write the engine's own queries as an input file; returns its answers."""
    truth = json.loads(gzip.decompress((DATA / f"{pod}.truth.json.gz").read_bytes()))
    with path.open("w") as file:
        for query in truth["queries"]:
            file.write(json.dumps({"tokens": query["tokens"], "cache_salt": query["cache_salt"]}) + "\n")
    return [query["hit_tokens"] for query in truth["queries"]]


async def _state(
    flags: list[str], until: Moment, folder: Path, snapshots: Path | None = None, options: ResolveOptions = OPTIONS
) -> PastIndex:
    kafka = KafkaSettings(brokers=flags[1], topic_prefix=flags[3])
    async with LogReader(kafka) as reader:
        return await rebuild(reader, kafka, until, folder=folder, options=options, clock=lambda: 0, snapshots=snapshots)


def _tables(past: PastIndex) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    return dict(past.blocks.items()), dict(past.engine_blocks.items())


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
def test_the_end_of_the_log_answers_as_the_engine_does(log, tmp_path, capsys, pod):  # noqa: F811
    """The state at the latest moment gives every hit that the recorded engine itself reported."""
    expected = questions(tmp_path / "q.jsonl", pod)
    flags = ["--model", "demo-model", "--input", str(tmp_path / "q.jsonl"), "--json"]
    assert main(["at", "latest", "score", *flags, *log]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    got = [answer["scores"].get(pod, {}).get("matched_tokens", 0) for answer in answers]
    assert got == expected


def test_a_state_from_a_snapshot_equals_one_from_the_start(log, tmp_path):  # noqa: F811
    """Going on from a saved state gives the same tables, byte for byte."""
    middle, end = Moment(time_ms=(BEGAN + 40) * 1000), Moment(edge="latest")
    early = asyncio.run(_state(log, middle, tmp_path / "early"))
    early.save(tmp_path / "snapshots" / "1", log[1], log[3] + "kv-events")
    resumed = asyncio.run(_state(log, end, tmp_path / "resumed", tmp_path / "snapshots"))
    whole = asyncio.run(_state(log, end, tmp_path / "whole"))
    assert resumed.counts["updates"] < whole.counts["updates"]
    assert _tables(resumed) == _tables(whole)
    assert resumed.pods() == whole.pods()
    resumed.close()
    whole.close()


def test_a_snapshot_past_the_moment_is_not_used(log, tmp_path):  # noqa: F811
    """A state saved later than the moment asked for cannot be its base."""
    late = asyncio.run(_state(log, Moment(edge="latest"), tmp_path / "late"))
    late.save(tmp_path / "snapshots" / "1", log[1], log[3] + "kv-events")
    middle = Moment(time_ms=(BEGAN + 40) * 1000)
    with_snapshots = asyncio.run(_state(log, middle, tmp_path / "a", tmp_path / "snapshots"))
    shutil.rmtree(tmp_path / "snapshots")
    without = asyncio.run(_state(log, middle, tmp_path / "b"))
    assert _tables(with_snapshots) == _tables(without)
    with_snapshots.close()
    without.close()


def test_a_snapshot_of_other_options_is_not_used(log, tmp_path):  # noqa: F811
    """A state folded under another meaning of events is no base, even at the same offsets."""
    middle = Moment(time_ms=(BEGAN + 40) * 1000)
    gpu_only = ResolveOptions(block_size_tokens=16, clears="gpu")
    asyncio.run(_state(log, middle, tmp_path / "a", options=gpu_only)).save(
        tmp_path / "snapshots" / "1", log[1], log[3] + "kv-events"
    )
    for number, (options, base) in enumerate(((gpu_only, True), (OPTIONS, False))):
        past = asyncio.run(_state(log, LATEST, tmp_path / f"b{number}", tmp_path / "snapshots", options))
        whole = asyncio.run(_state(log, LATEST, tmp_path / f"c{number}", options=options))
        assert (past.counts["updates"] < whole.counts["updates"]) == base
        past.close()
        whole.close()


async def _delete_beginning(flags: list[str], records_deleted: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=flags[1])
    await admin.start()
    try:
        partition = TopicPartition(flags[3] + topics.EVENTS, pod_ids.pod_partition("pod-a", PARTITIONS))
        await admin.delete_records({partition: RecordsToDelete(before_offset=records_deleted)})
    finally:
        await admin.close()


def test_a_log_that_lost_its_beginning_is_said_so(log, capsys):  # noqa: F811
    """Records that retention took are not in the state, and standard error says from where on it is known."""
    assert main(["at", "latest", "pods", *log]) == 0
    assert "begins at" not in capsys.readouterr().err
    asyncio.run(_delete_beginning(log, 5))
    assert main(["at", "latest", "pods", *log]) == 0
    assert f"kv-events begins at {pod_ids.pod_partition('pod-a', PARTITIONS)}/5" in capsys.readouterr().err


def test_pods_and_explain_of_the_past(log, tmp_path, capsys):  # noqa: F811
    """Before the first message there is no pod; ten messages in, there are two and their blocks have holders."""
    assert main(["at", f"@{BEGAN - 1}", "pods", "--json", *log]) == 0
    assert capsys.readouterr().out == ""
    assert main(["at", f"@{BEGAN + 10}", "pods", "--json", *log]) == 0
    found = {pod["pod"]: pod for line in capsys.readouterr().out.splitlines() if (pod := json.loads(line))}
    assert {name: pod["last_sequence"] for name, pod in found.items()} == {"pod-a": 9, "pod-b": 9}
    expected = questions(tmp_path / "q.jsonl", "pod-a")
    first = next(number for number, hit in enumerate(expected) if hit)
    line = (tmp_path / "q.jsonl").read_text().splitlines()[first]
    (tmp_path / "one.jsonl").write_text(line + "\n")
    flags = ["--model", "demo-model", "--input", str(tmp_path / "one.jsonl"), "--json"]
    assert main(["at", "latest", "explain", *flags, *log]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    held = [
        any(holder["pod"] == "pod-a" and holder["state"] == "live" for holder in block["holders"]) for block in blocks
    ]
    assert all(held[: expected[first] // 16])
    assert not all(held) or len(held) == expected[first] // 16


def test_diff_counts_what_came_and_went(log, capsys):  # noqa: F811
    """Blocks added less blocks removed is the difference of what is held; the reset shows as a raised epoch."""
    assert main(["diff", "earliest", "latest", "--json", *log]) == 0
    whole = {row["pod"]: row for line in capsys.readouterr().out.splitlines() if (row := json.loads(line))}
    assert whole["pod-a"]["removed"] == 0
    assert whole["pod-b"]["messages"] == 99
    assert main(["diff", f"@{BEGAN + 20}", "latest", "--json", *log]) == 0
    part = {row["pod"]: row for line in capsys.readouterr().out.splitlines() if (row := json.loads(line))}
    assert part["pod-a"]["epoch_raised"]
    assert not part["pod-b"]["epoch_raised"]
    assert part["pod-b"]["messages"] == 79
    assert main(["diff", "earliest", f"@{BEGAN + 20}", "--json", *log]) == 0
    start = {row["pod"]: row for line in capsys.readouterr().out.splitlines() if (row := json.loads(line))}
    for pod in whole:
        assert start[pod]["added"] + part[pod]["added"] - part[pod]["removed"] == whole[pod]["added"]


async def _in_changelog(kafka: KafkaSettings) -> None:
    """Wait until the changelog of engine_blocks reflects all of kv-events; the index has it before."""
    name = topics.changelog_topics("kvatlas")[0].name
    deadline = time.monotonic() + 90
    while True:
        reflected: dict[int, int] = {}

        def note(record: Any, reflected: dict[int, int] = reflected) -> None:
            if record.key == META_KEY:
                reflected[record.partition] = decode_meta(record.value).source_offset + 1

        await read_records(kafka, name, note)
        ends = (await _offsets(kafka)).offsets or {}
        if all(reflected.get(partition, 0) >= end for partition, end in ends.items()):
            return
        assert time.monotonic() < deadline, (reflected, ends)
        await asyncio.sleep(0.2)


async def _live_tables(kafka: KafkaSettings) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The worker's tables, as their changelogs have them: block_index without positions, engine_blocks."""
    await _in_changelog(kafka)
    tables: list[dict[bytes, bytes]] = []
    for topic in reversed(topics.changelog_topics("kvatlas")):
        table: dict[bytes, bytes] = {}

        def note(key: bytes | None, value: bytes | None, _: int, table: dict[bytes, bytes] = table) -> None:
            assert key is not None
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value

        await read_topic(kafka, topic.name, note)
        tables.append({key: value for key, value in table.items() if not key.startswith(b"\0kvatlas")})
    return {key: value for key, value in tables[0].items() if not is_meta(key)}, tables[1]


async def _offsets(kafka: KafkaSettings) -> Moment:
    """The end of kv-events now."""
    async with LogReader(kafka) as reader:
        span = await reader.range(topics.EVENTS, EARLIEST, LATEST)
        return Moment(offsets={partition: end for partition, (_, end) in span.bounds.items()})


async def test_a_state_at_an_offset_is_what_the_worker_had_there(
    brokers: str, topic_prefix: str, tmp_path: Path
) -> None:
    """Rebuilt at the offsets of an earlier moment, both tables equal the live worker's of that moment, entry by entry.

    The live ones are saved when the worker has applied everything; then traffic with evictions, clears and restarts
    goes on and changes them.
    """
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    worker = WorkerProcess(kafka, tmp_path / "w", "--sweep-interval-seconds=86400")
    try:
        await worker.ready()
        async with producing(kafka) as producer:
            saved = []
            for _ in range(2):
                for _ in range(3):
                    fleet.serve(20)
                    fleet.disturb(clear=0.5, restart=0.5)
                    await fleet.flush(producer)
                assert_true(await until_true(kafka, fleet.truth()), 4)
                saved.append((await _offsets(kafka), await _live_tables(kafka)))
    finally:
        worker.close()
    assert saved[0][1] != saved[1][1]
    for number, (moment, (blocks, engine_blocks)) in enumerate(saved):
        folder = tmp_path / f"past-{number}"
        async with LogReader(kafka) as reader:
            past = await rebuild(reader, kafka, moment, folder=folder, options=OPTIONS, clock=lambda: 0)
        then = {key: value for key, value in past.blocks.items() if not is_meta(key)}
        assert {key: sorted(holders(value)) for key, value in then.items()} == {
            key: sorted(holders(value)) for key, value in blocks.items()
        }
        assert dict(past.engine_blocks.items()) == engine_blocks
        past.close(keep=False)
