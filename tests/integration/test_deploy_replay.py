"""`kvatlas replay` against a real Kafka: ranges, filters, captures and playback."""

import asyncio
import functools
import gzip
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import block_key, pod_ids, records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli.entry import main
from kvatlas.deploy.history.capture import read_capture
from kvatlas.streams.index.blocks_record import OP_ADD, Run, encode_blocks
from kvatlas.streams.index.holders import pack_holder
from tests.integration.pipeline_support import Service, eventually

DATA = Path(__file__).parent.parent / "data" / "captures"
PARTITIONS = 4
#: When the recorded messages reached the log, seconds since 1970: lately, or Kafka's retention takes them away.
BEGAN = int(time.time()) - 600


@functools.cache
def frames(pod: str) -> list[list[bytes]]:
    """The recorded frames of a pod."""
    return list(msgpack.Unpacker(io.BytesIO(gzip.decompress((DATA / f"{pod}.frames.gz").read_bytes())), raw=True))


async def _fill(brokers: str, prefix: str) -> None:
    settings = KafkaSettings(brokers=brokers, topic_prefix=prefix, partitions=PARTITIONS)
    await ensure_topics(settings, topics.TOPICS)
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()
    try:
        for number in range(99):
            for pod in ("pod-a", "pod-b"):
                messages = frames(pod)
                if number >= len(messages):
                    continue
                topic, sequence, payload = messages[number]
                await producer.send(
                    settings.topic(topics.EVENTS),
                    payload,
                    key=pod.encode(),
                    partition=pod_ids.pod_partition(pod, PARTITIONS),
                    timestamp_ms=(BEGAN + number) * 1000,
                    headers=[
                        (topics.H_SEQUENCE, str(int.from_bytes(sequence, "big")).encode()),
                        (topics.H_INCARNATION, b"1"),
                        (topics.H_ENGINE_TOPIC, topic),
                        (topics.H_MODEL, b"demo-model"),
                        (topics.H_ENGINE, b"vllm"),
                        (topics.H_CONTENT_TYPE, b"engine"),
                    ],
                )
        await producer.flush()
    finally:
        await producer.stop()


@pytest.fixture
def log(brokers: str, topic_prefix: str) -> list[str]:
    """Flags that point at a fresh log holding both recorded pods, a second between messages of a pod."""
    asyncio.run(_fill(brokers, topic_prefix))
    return ["--brokers", brokers, "--topic-prefix", topic_prefix]


def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[dict]:
    """What the command printed, as objects."""
    return (json.loads(line) for line in capsys.readouterr().out.splitlines())


def test_a_pod_s_range_by_sequence(log: list[str], capsys: pytest.CaptureFixture[str]):
    """--since and --until take sequences of one pod; the end is exclusive."""
    assert main(["replay", *log, "--pod", "pod-b", "--since", "seq:10", "--until", "seq:13", "--json"]) == 0
    assert [(line["pod"], line["sequence"]) for line in lines(capsys)] == [("pod-b", n) for n in (10, 11, 12)]


def test_a_range_by_time_is_in_the_order_of_time(log: list[str], capsys: pytest.CaptureFixture[str]):
    """Records of all partitions come in the order of their time, from the first moment to before the second."""
    assert main(["replay", *log, "--since", f"@{BEGAN + 10}", "--until", f"@{BEGAN + 20}", "--json"]) == 0
    found = list(lines(capsys))
    assert len(found) == 20
    assert [line["timestamp_ms"] for line in found] == sorted(line["timestamp_ms"] for line in found)
    assert {line["sequence"] for line in found} == set(range(10, 20))


def test_counts_and_types(log: list[str], capsys: pytest.CaptureFixture[str]):
    """--count prints how many records and events of each kind match."""
    assert main(["replay", *log, "--type", "cleared", "--count", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"read": 163, "cleared": 1, "matched": 1}


def test_the_table_names_every_event(log: list[str], capsys: pytest.CaptureFixture[str]):
    """Without --json people get a header and one row an event."""
    assert main(["replay", *log, "--pod", "pod-a", "--limit", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("time")
    assert "stored" in out[1]
    assert "gpu" in out[1]


def test_a_capture_holds_the_same_records(log: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Saved and loaded again, a range reads the same as from Kafka."""
    path = tmp_path / "log.kvcap"
    assert main(["replay", *log, "--to", str(path)]) == 0
    assert len(list(read_capture(path))) == 163
    capsys.readouterr()
    assert main(["replay", *log, "--json"]) == 0
    live = list(lines(capsys))
    assert main(["replay", "--from", str(path), "--json"]) == 0
    assert list(lines(capsys)) == live


def test_playback_sends_the_engine_s_own_bytes(log: list[str], tmp_path: Path):
    """A subscriber gets the frames that the engine once sent, in order."""
    received: list[list[bytes]] = []
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    subscriber.setsockopt(zmq.RCVHWM, 0)
    port = subscriber.bind_to_random_port("tcp://127.0.0.1")

    def receive() -> None:
        while subscriber.poll(60_000):
            received.append(subscriber.recv_multipart())
            if len(received) == len(frames("pod-a")):
                return

    thread = threading.Thread(target=receive)
    thread.start()
    target = f"zmq://127.0.0.1:{port}"
    assert main(["replay", *log, "--pod", "pod-a", "--to", target, "--speed", "0"]) == 0
    thread.join(60)
    subscriber.close()
    context.term()
    assert received == frames("pod-a")


def test_a_capture_is_played_to_a_bridge(brokers: str, topic_prefix: str, tmp_path: Path):
    """A bridge that engines connect to takes a capture for the engines: the same messages are on its log, in order."""
    capture = Path(__file__).parents[2] / "deploy" / "examples" / "demo.kvcap"
    [port] = free_ports(1)
    flags = ["--brokers", brokers, "--topic-prefix", topic_prefix]
    bridge = Service(
        tmp_path / "bridge.log", "bridge", *flags, "--partitions=2", "--ownership=all", f"--bind=tcp://127.0.0.1:{port}"
    )
    try:
        bridge.ready()
        assert main(["replay", "--from", str(capture), "--to", f"zmq://127.0.0.1:{port}", "--speed", "0"]) == 0
        saved = [record for record in read_capture(capture) if record.key == b"pod-b"]
        assert not eventually(lambda: _payloads(flags, tmp_path / "log.kvcap") != [one.value for one in saved], 60)
    finally:
        bridge.close()


def _payloads(flags: list[str], path: Path) -> list[bytes | None]:
    """The engine messages of pod-b on a log, in order."""
    assert main(["replay", *flags, "--pod", "pod-b", "--to", str(path)]) == 0
    return [record.value for record in read_capture(path) if (topics.H_CONTENT_TYPE, b"engine") in record.headers]


def test_a_range_by_offset(log: list[str], capsys: pytest.CaptureFixture[str]):
    """Offsets may be given for each partition; partitions that are not named are left out."""
    partition = pod_ids.pod_partition("pod-a", PARTITIONS)
    since, until = f"offset:{partition}:5", f"offset:{partition}:8"
    assert main(["replay", *log, "--since", since, "--until", until, "--json"]) == 0
    assert {(line["partition"], line["offset"]) for line in lines(capsys)} == {(partition, n) for n in (5, 6, 7)}


def test_a_token_prefix_finds_the_messages_that_touch_its_blocks(log: list[str], capsys: pytest.CaptureFixture[str]):
    """Messages are found by the tokens of a prompt, and by one of its block keys, and by their model."""
    truth = json.loads(gzip.decompress((DATA / "pod-b.truth.json.gz").read_bytes()))
    query = next(query for query in truth["queries"] if query["hit_tokens"] >= 160)
    tokens = ["--tokens", ",".join(map(str, query["tokens"][:160])), "--block-size-tokens", "16"]
    salt = ["--cache-salt", query["cache_salt"]] if query["cache_salt"] else []
    assert main(["replay", *log, "--model", "demo-model", *tokens, *salt, "--json"]) == 0
    found = list(lines(capsys))
    assert 0 < len(found) < 163
    root = block_key.root_key("demo-model", None, query["cache_salt"])
    first = block_key.block_keys(root, block_key.pack_tokens(query["tokens"][:16]), 16)[0]
    assert main(["replay", *log, "--key", first.hex(), "--json"]) == 0
    by_key = list(lines(capsys))
    assert by_key
    assert {(line["pod"], line["sequence"]) for line in by_key} <= {(line["pod"], line["sequence"]) for line in found}
    assert main(["replay", *log, "--model", "another", "--count", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"read": 163}


async def _send_derived(brokers: str, prefix: str) -> None:
    """Write block updates and decisions of two pods, as a worker and a scorer would."""
    settings = KafkaSettings(brokers=brokers, topic_prefix=prefix, partitions=PARTITIONS)
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()
    for number, pod in enumerate(("pod-a", "pod-b")):
        key = bytes([number]) * 16
        run = Run(pod_ids.pod_ref(pod), 1, 0, 0, 1)
        holder = pack_holder(pod_ids.pod_ref(pod), 0, 1, 0, 0, 1)
        value = encode_blocks([run], key, bytes([OP_ADD]), holder, 0)
        await producer.send_and_wait(settings.topic(topics.BLOCKS), value, partition=0)
        made = records.DecisionRecord(request_id=f"r-{pod}", pod=pod, model="m", keys=key, decided_ns=1)
        await producer.send_and_wait(settings.topic(topics.DECISIONS), records.encode(made), key=b"r", partition=0)
    await producer.stop()


@pytest.mark.parametrize("flags", [["--pod", "pod-b"], ["--key", "01" * 16]])
def test_block_updates_and_decisions_are_replayed(log: list[str], capsys: pytest.CaptureFixture[str], flags: list[str]):
    """kv-blocks and kv-decisions are read like kv-events, by pod and by block key."""
    asyncio.run(_send_derived(log[1], log[3]))
    assert main(["replay", *log, "--topic", "kv-blocks", *flags, "--json"]) == 0
    (block,) = lines(capsys)
    assert (block["added"], block["tiers"], block["runs"][0]["pod_ref"]) == (
        1,
        {"gpu": 1},
        f"{pod_ids.pod_ref('pod-b'):016x}",
    )
    assert main(["replay", *log, "--topic", "kv-decisions", *flags, "--json"]) == 0
    (decision,) = lines(capsys)
    assert (decision["decision"]["request_id"], decision["decision"]["blocks"]) == ("r-pod-b", 1)


@pytest.mark.parametrize(
    ("topic", "words"),
    [("kv-blocks", ["added", "gpu=1"]), ("kv-decisions", ["request", "r-pod-b"])],
)
def test_other_topics_have_tables_too(log: list[str], capsys: pytest.CaptureFixture[str], topic: str, words: list[str]):
    """People get a header and one row a record; types of updates are filtered like those of events."""
    asyncio.run(_send_derived(log[1], log[3]))
    assert main(["replay", *log, "--topic", topic, "--pod", "pod-b"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert words[0] in head
    assert words[1] in row
    if topic == "kv-blocks":
        assert main(["replay", *log, "--topic", topic, "--type", "removed", "--count", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"read": 2}


def test_a_capture_is_cut_like_the_log(log: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Moments by time, offset and sequence mean the same over a capture as over Kafka."""
    path = tmp_path / "log.kvcap"
    assert main(["replay", *log, "--to", str(path)]) == 0
    partition = pod_ids.pod_partition("pod-a", PARTITIONS)
    for words in (
        ["--since", f"@{BEGAN + 10}", "--until", f"@{BEGAN + 20}"],
        ["--since", "offset:7", "--until", "offset:9"],
        ["--since", f"offset:{partition}:5", "--until", f"offset:{partition}:8"],
        ["--pod", "pod-b", "--since", "seq:10", "--until", "seq:13"],
        ["--pod", "pod-b", "--since", "seq:1:10", "--until", "seq:2:0", "--type", "removed"],
        ["--since", "latest"],
        ["--until", "earliest"],
    ):
        capsys.readouterr()
        assert main(["replay", *log, *words, "--json"]) == 0
        live = list(lines(capsys))
        assert main(["replay", "--from", str(path), *words, "--json"]) == 0
        assert list(lines(capsys)) == live, words
        assert live or words[1] in ("latest", "earliest")


def test_a_topic_that_is_not_there_says_how_to_make_it(brokers: str, capsys: pytest.CaptureFixture[str]):
    """Pointing at the wrong prefix is an error with the fix, not an empty answer."""
    assert main(["replay", "--brokers", brokers, "--topic-prefix", "nowhere-"]) == 1
    assert "kvatlas topics" in capsys.readouterr().err


def test_an_unreachable_broker_is_named(capsys: pytest.CaptureFixture[str]):
    """The error has the address that was tried."""
    assert main(["replay", "--brokers", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
