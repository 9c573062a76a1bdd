"""Audit: is the index what the pods hold? Compares the served index with a truth, pod by pod and tier by tier.

The keys to ask for are those of the truth and those that the index's changelog knows, so that both directions show:
a *ghost* is in the index and not at the pod, a *missing* block is at the pod and not in the index. Holders of ended
epochs do not exist, as for a scorer; holders that a gap made suspect are counted apart when they are ghosts, since a
router is told that they may be gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc
import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader, Record
from kvatlas.deploy.history.moment import EARLIEST, LATEST
from kvatlas.streams.errors import StreamsError
from kvatlas.streams.index.columns import NOT_ANSWERED, read_index
from kvatlas.streams.index.holders import are_holders, holders
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.fold import LogFold
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions
from kvatlas.streams.v1 import block_index_pb2 as pb

logger = logging.getLogger(__name__)

_LOOKUP_KEYS: Final = 8_192
#: How long an audit waits for partitions that no worker answers for.
_COVERED_SECONDS: Final = 30.0
_COVERED_POLL_SECONDS: Final = 0.5

aio: Any = getattr(grpc, "aio")  # noqa: B009 # the stubs of grpc leave out its asyncio half

#: pod id -> tier name -> block keys.
Truth = Mapping[str, Mapping[str, frozenset[bytes]]]


class PodAudit(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found for one pod.

    Attributes:
        pod: pod id.
        held: (block, tier) pairs in the truth.
        ghosts: pairs in the index and not in the truth.
        missing: pairs in the truth and not in the index.
        suspect_ghosts: pairs that the index flags as suspect and the truth does not have.
        examples: a few of them, for people: ``ghost gpu 0a1b...``.
    """

    pod: str
    held: int
    ghosts: int
    missing: int
    suspect_ghosts: int = 0
    examples: list[str] = []


async def audit(
    kafka: KafkaSettings, truth: Truth, *, app: str = "kvatlas", version: str = topics.BASE_VERSION
) -> list[PodAudit]:
    """Compare the index that the workers serve with a truth. The log must have been drained.

    Args:
        kafka: how to reach the brokers.
        truth: what the pods hold; pods that are not in it are expected to hold nothing.
        app: name of the workers' app.
        version: the index version that is compared.

    Raises:
        StreamsError: a partition is not answered by any worker.
    """
    pods = PodDirectory(version)
    await read_topic(kafka, topics.PODS, lambda key, value, _: pods.apply(key, value))
    workers = await _answering(kafka, version)
    keys: set[bytes] = {key for tiers in truth.values() for held in tiers.values() for key in held}
    changelog = topics.changelog_topics(topics.version_app(app, version))[1].name

    def note(key: bytes | None, value: bytes | None, _: int) -> None:
        if key is not None and value is not None and len(key) == KEY_BYTES:
            keys.add(key)

    await read_topic(kafka, changelog, note)
    index = await lookup_all(sorted(keys), workers)
    return compare(index, truth, pods.records())


def compare(index: Mapping[bytes, bytes], truth: Truth, pods: Sequence[PodRecord]) -> list[PodAudit]:
    """Compare table values with a truth.

    Args:
        index: block key -> packed holders.
        truth: pod id -> tier name -> keys.
        pods: merged pod records, for names and epochs.
    """
    known = {pod_ids.pod_ref(pod.pod): pod for pod in pods}
    held: dict[str, dict[str, set[bytes]]] = {}
    suspect: set[tuple[str, str, bytes]] = set()
    for key, value in index.items():
        if not are_holders(value):
            logger.warning("block %s: its value of %d bytes is none and is passed over", key.hex(), len(value))
            continue
        for holder in holders(value):
            pod = known.get(holder.pod_ref)
            if pod is None or holder.tier == Tier.SHARED:
                continue
            state = pod.validity.state(holder.tier, holder.epoch)
            if state == "dead":
                continue
            tier = Tier(holder.tier).name.lower()
            held.setdefault(pod.pod, {}).setdefault(tier, set()).add(key)
            if state == "suspect":
                suspect.add((pod.pod, tier, key))
    names = sorted({*truth, *held})
    return [_compare_pod(pod, held.get(pod, {}), truth.get(pod, {}), suspect) for pod in names]


def _compare_pod(
    pod: str,
    held: Mapping[str, set[bytes]],
    truth: Mapping[str, frozenset[bytes]],
    suspect: set[tuple[str, str, bytes]],
) -> PodAudit:
    ghosts: list[tuple[str, bytes]] = []
    missing: list[tuple[str, bytes]] = []
    flagged = 0
    for tier in sorted({*held, *truth}):
        real, there = truth.get(tier, frozenset()), held.get(tier, set())
        for key in there - real:
            if (pod, tier, key) in suspect:
                flagged += 1
            else:
                ghosts.append((tier, key))
        missing += [(tier, key) for key in real - there]
    examples = [f"ghost {tier} {key.hex()}" for tier, key in ghosts[:3]]
    examples += [f"missing {tier} {key.hex()}" for tier, key in missing[:3]]
    return PodAudit(
        pod=pod,
        held=sum(len(keys) for keys in truth.values()),
        ghosts=len(ghosts),
        missing=len(missing),
        suspect_ghosts=flagged,
        examples=examples,
    )


async def _answering(kafka: KafkaSettings, version: str) -> WorkerDirectory:
    """Return the workers once they answer for every partition, which takes a moment after a restart or a rebalance."""
    until = time.monotonic() + _COVERED_SECONDS
    while True:
        workers = WorkerDirectory(time.time_ns, version)
        await read_topic(kafka, topics.WORKERS, lambda key, value, _, to=workers: to.apply(key, value))
        missing = workers.uncovered()
        if not missing or time.monotonic() >= until:
            return workers
        logger.info("waiting for a worker that answers for partitions %s", ", ".join(map(str, missing)))
        await asyncio.sleep(_COVERED_POLL_SECONDS)


async def lookup_all(keys: Sequence[bytes], workers: WorkerDirectory) -> dict[bytes, bytes]:
    """Ask the workers that announce themselves for the index values of keys.

    Args:
        keys: packed block keys.
        workers: who answers for which partition.

    Returns:
        Key -> encoded value, of the keys that the index has.

    Raises:
        StreamsError: no worker is announced, or a partition is answered by none.
    """
    live = [record for record in workers.records.values() if record.partitions]
    count = max((record.partition_count for record in live), default=0)
    if not count:
        raise StreamsError("no worker announces partitions on kv-workers; is one running?")
    by_owner: dict[str, list[bytes]] = {}
    for key in keys:
        owner = workers.owner(partition_of(key, count), besides="")
        if not owner:
            raise StreamsError(f"partition {partition_of(key, count)} of kv-blocks has no worker")
        by_owner.setdefault(owner, []).append(key)
    found: dict[bytes, bytes] = {}
    for endpoint, mine in by_owner.items():
        async with aio.insecure_channel(endpoint, options=[("grpc.max_receive_message_length", -1)]) as channel:
            stub = stub_of(channel, pb)
            for at in range(0, len(mine), _LOOKUP_KEYS):
                part = mine[at : at + _LOOKUP_KEYS]
                answer = await stub.Lookup(pb.LookupRequest(keys=b"".join(part), partition_count=count))
                for key, number in zip(part, read_index(answer.index), strict=True):
                    if number == NOT_ANSWERED:
                        raise StreamsError(f"{endpoint} does not answer for partition {partition_of(key, count)}")
                    if number:
                        found[key] = answer.values[number - 1]
    return found


async def fold_events(kafka: KafkaSettings, options: ResolveOptions) -> Truth:
    """Return what every pod holds as its whole ``kv-events`` log says, worked out from nothing in memory.

    For real engines, which cannot be asked: it shows whether the tables are what the log says.
    """
    index = DictView()
    fold = LogFold(options, DictView(), index, lambda: 0)
    pods: dict[str, PodRecord] = {}

    def apply(message: Record) -> None:
        parsed = parse_message(message.key, message.value, message.headers, message.partition, message.offset)
        pods.update(fold.apply([parsed]).pods)

    await read_records(kafka, topics.EVENTS, apply)
    known = {pod_ids.pod_ref(pod): record for pod, record in pods.items()}
    truth: dict[str, dict[str, set[bytes]]] = {pod: {} for pod in pods}
    for key, value in index.values.items():
        if len(key) != KEY_BYTES:
            continue
        for holder in holders(value):
            pod = known.get(holder.pod_ref)
            if pod is not None and holder.tier != Tier.SHARED and pod.validity.counts(holder.tier, holder.epoch):
                truth[pod.pod].setdefault(Tier(holder.tier).name.lower(), set()).add(key)
    return {pod: {tier: frozenset(keys) for tier, keys in tiers.items()} for pod, tiers in truth.items()}


def read_truth(document: bytes) -> Truth:
    """Read the truth endpoint's JSON: pod -> tier -> block keys in hexadecimal.

    Raises:
        StreamsError: it is something else.
    """
    try:
        found = msgspec.json.decode(document, type=dict[str, dict[str, list[str]]])
        return {
            pod: {tier: frozenset(map(bytes.fromhex, keys)) for tier, keys in tiers.items()}
            for pod, tiers in found.items()
        }
    except DECODE_ERRORS as error:
        raise StreamsError(f"the truth is not JSON of pod -> tier -> hexadecimal block keys: {error}") from error


async def read_topic(kafka: KafkaSettings, topic: str, apply: Any) -> None:
    """Hand key, value and offset of every record that a topic has now to ``apply``, each partition in order."""
    await read_records(kafka, topic, lambda record: apply(record.key, record.value, record.offset))


async def read_records(kafka: KafkaSettings, topic: str, apply: Callable[[Record], None]) -> None:
    """Hand every record that a topic has now to ``apply``, each partition in order.

    Raises:
        LogError: the topic does not exist, or Kafka does not answer.
    """
    async with LogReader(kafka, "kvatlas-audit") as reader:
        async for chunk in reader.read(await reader.range(topic, EARLIEST, LATEST)):
            for record in chunk:
                apply(record)
