"""`kvatlas why` and `kvatlas top` against a real Kafka."""

import asyncio
import gzip
import json
import time

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import block_key, pod_ids, records, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli.entry import main

from .test_deploy_replay import BEGAN, DATA, PARTITIONS, log  # noqa: F401 - the fixture


async def _send(brokers: str, topic: str, sent: list[tuple[bytes, bytes, int]]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()
    for key, value, partition in sent:
        await producer.send_and_wait(topic, value, key=key, partition=partition)
    await producer.stop()


def decision(pod: str, seconds: int, predicted: int) -> records.DecisionRecord:
    """A decision about the recorded pod's first query with a hit, so many seconds into the recording."""
    truth = json.loads(gzip.decompress((DATA / f"{pod}.truth.json.gz").read_bytes()))
    query = next(query for query in truth["queries"] if query["hit_tokens"] >= 160)
    root = block_key.root_key("demo-model", None, query["cache_salt"])
    keys = block_key.block_keys(root, block_key.pack_tokens(query["tokens"]), 16)
    return records.DecisionRecord(
        request_id="r-1",
        pod=pod,
        model="demo-model",
        keys=b"".join(keys),
        predicted_blocks=predicted,
        scores={pod: (float(predicted), predicted)},
        decided_ns=(BEGAN + seconds) * 10**9,
    )


@pytest.mark.parametrize(("seconds", "reason"), [(0, "never cached"), (200, "stale view")])
def test_why_compares_the_prediction_with_the_log(log, capsys, seconds, reason):  # noqa: F811
    """Before the first message nothing was cached anywhere; at the end the log holds what the engine reported."""
    made = decision("pod-b", seconds, predicted=1000)
    topic = log[3] + topics.DECISIONS
    partition = pod_ids.pod_partition("pod-b", PARTITIONS)
    asyncio.run(_send(log[1], topic, [(b"r-1", records.encode(made), partition)]))
    assert main(["why", "r-1", "--json", *log]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decision"]["pod"] == "pod-b"
    assert any(reason in text for text in found["verdict"]["reasons"])
    assert (found["verdict"]["held"] >= 10) == (seconds > 0)


async def _stored_and_evicted(settings: KafkaSettings, tokens: list[int]) -> None:
    """Pod `a` stores four blocks and evicts the last two of them 30 s later; pod `b` stores the first one."""
    await ensure_topics(settings, topics.TOPICS)
    stored = {"type": "BlockStored", "parent_block_hash": None, "block_size": 16, "lora_id": None, "medium": "GPU"}
    sent: list[tuple[str, int, dict[str, object]]] = [
        ("a", 0, {**stored, "block_hashes": [1, 2, 3, 4], "token_ids": tokens, "lora_name": None}),
        ("b", 0, {**stored, "block_hashes": [1], "token_ids": tokens[:16], "lora_name": None}),
        ("a", 30, {"type": "BlockRemoved", "block_hashes": [4, 3], "medium": "GPU"}),
    ]
    producer = AIOKafkaProducer(bootstrap_servers=settings.brokers)
    await producer.start()
    for number, (pod, seconds, event) in enumerate(sent):
        await producer.send_and_wait(
            settings.topic(topics.EVENTS),
            encode_batch(0.0, [event], 0),
            key=pod.encode(),
            partition=pod_ids.pod_partition(pod, PARTITIONS),
            timestamp_ms=(BEGAN + seconds) * 1000,
            headers=[
                (topics.H_SEQUENCE, str(number).encode()),
                (topics.H_INCARNATION, b"1"),
                (topics.H_MODEL, b"m"),
                (topics.H_ENGINE, b"vllm"),
                (topics.H_CONTENT_TYPE, b"engine"),
            ],
        )
    await producer.stop()


def test_why_tells_where_a_lost_hit_went(brokers, topic_prefix, capsys):
    """Five blocks of prompt: never cached, to another pod, counted when they were gone, and evicted soon after."""
    settings = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=PARTITIONS)
    tokens = list(range(80))
    asyncio.run(_stored_and_evicted(settings, tokens[:64]))
    keys = b"".join(block_key.block_keys(block_key.root_key("m"), block_key.pack_tokens(tokens), 16))
    never = "never cached: 1 of 5 blocks were on no pod"
    expected = {
        "hit": ("a", 10, 4, [never]),
        "routing": ("b", 10, 1, [never, "routing: a held 3 blocks more than b"]),
        "evicted": ("a", 25, 4, [never, "eviction: 2 of the blocks were gone by the later moment"]),
        "stale": ("a", 40, 4, ["never cached: 3 of 5", "stale view: 2 predicted blocks were gone already"]),
    }
    sent = []
    for name, (pod, seconds, predicted, _) in expected.items():
        made = records.DecisionRecord(
            request_id=name,
            pod=pod,
            model="m",
            keys=keys,
            predicted_blocks=predicted,
            decided_ns=(BEGAN + seconds) * 10**9,
        )
        sent.append((name.encode(), records.encode(made), 0))
    asyncio.run(_send(brokers, settings.topic(topics.DECISIONS), sent))
    for name, (_, _, _, reasons) in expected.items():
        assert main(["why", name, "--after=10", "--brokers", brokers, "--topic-prefix", topic_prefix, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["verdict"]["reasons"]
        assert len(found) == len(reasons), (name, found)
        assert all(text.startswith(start) for text, start in zip(found, reasons, strict=True)), (name, found)


def test_why_of_an_unknown_request_says_how_decisions_get_there(log, capsys):  # noqa: F811
    """The error names the topic and what fills it."""
    assert main(["why", "nobody", *log]) == 1
    assert "ReportDecision" in capsys.readouterr().err


async def _announce(settings: KafkaSettings) -> None:
    await ensure_topics(settings, topics.TOPICS)
    pod = records.PodRecord(pod="p", writer=pod_ids.WRITER_STREAMS, last_sequence=7, lost=2, first_lost=3, last_lost=4)
    worker = records.WorkerRecord(
        worker="w",
        endpoint="127.0.0.1:1",
        partitions=[0, 1],
        restoring=[2],
        partition_count=4,
        expires_ns=time.time_ns() + 600 * 10**9,
    )
    key = pod_ids.pod_key(pod_ids.WRITER_STREAMS, "p")
    await _send(settings.brokers, settings.topic(topics.PODS), [(key, records.encode(pod), 0)])
    await _send(settings.brokers, settings.topic(topics.WORKERS), [(b"w", records.encode(worker), 0)])


def test_top_once_shows_pods_workers_and_what_nobody_serves(brokers, topic_prefix, capsys):
    """A restoring and an unowned partition count as unserved, and the exit code says so."""
    asyncio.run(_announce(KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=4)))
    flags = ["top", "--once", "--every", "0.1", "--brokers", brokers, "--topic-prefix", topic_prefix]
    assert main([*flags, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["unserved"] == [2, 3]
    assert [(row["pod"], row["sequence"], row["lost"]) for row in found["pods"]] == [("p", 7, 2)]
    assert found["workers"][0]["partitions"] == [0, 1]
    assert main(flags) == 1
    assert "2-3" in capsys.readouterr().out


def test_whatif_replays_recorded_decisions(brokers, topic_prefix, capsys):
    """Decisions on Kafka run through other policies, beside what the events showed of them."""
    settings = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=PARTITIONS)
    asyncio.run(ensure_topics(settings, topics.TOPICS))
    sent = []
    for number in range(8):
        # Two prompts of four blocks in turn, spread so that every pod computes both.
        keys = b"".join(bytes([number % 2, block]) * 8 for block in range(4))
        pod = f"pod-{number // 2 % 2}"
        hit = 4 if number >= 4 else 0
        made = records.DecisionRecord(
            request_id=f"r-{number}", pod=pod, keys=keys, predicted_blocks=hit, decided_ns=(number + 1) * 10**9
        )
        outcome = msgspec.structs.replace(made, kind="outcome", keys=b"", real_blocks=4)
        sent += [(b"r", records.encode(record), 0) for record in (made, outcome)]
    asyncio.run(_send(brokers, settings.topic(topics.DECISIONS), sent))
    flags = ["whatif", "recorded", "precise:1", "--decisions", "--brokers", brokers, "--topic-prefix", topic_prefix]
    assert main([*flags, "--blocks", "8", "--delay-ms", "0", "--load-weight", "0", "--json"]) == 0
    rows = {row["policy"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (rows["observed"]["hit_ratio"], rows["recorded"]["hit_ratio"]) == (0.5, 0.5)
    assert rows["precise:1"]["hit_ratio"] == 0.75
    assert rows["precise:1"]["recomputed_tokens"] == 2 * 4 * 16
