"""The catalog of index versions on Kafka, and the topics of one version.

Order of the steps, each of which may be repeated: topics, then the catalog's entry (start); the catalog's active
version (switch); the catalog's entry, then topics and pod records (drop). No version in the catalog lacks its topics.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError, for_code

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import start_client
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.sending import send_record, started_producer
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.records import CATALOG_KEY, IndexCatalog, IndexVersion
from kvatlas.bridge.model.topics import BASE_VERSION
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.reindex.errors import ReindexError
from kvatlas.streams.options import WorkerSettings

_CLIENT_ID: Final = "kvatlas-reindex"
_READ_SECONDS: Final = 20.0


async def read_catalog(kafka: KafkaSettings) -> IndexCatalog:
    """Return the catalog as it is now; a deployment that never reindexed has one with the base version alone.

    Raises:
        LogError: Kafka does not answer, or the topics are missing.
    """
    table = WorkerDirectory(lambda: 0)
    await _read(kafka, topics.WORKERS, table.apply)
    return table.catalog


async def _read(kafka: KafkaSettings, topic: str, apply: Callable[[bytes | None, bytes | None], object]) -> None:
    """Hand all records that a topic has now to a function."""
    follower = TopicFollower(kafka, topic, apply, client_id=_CLIENT_ID)
    follower.start()
    try:
        await follower.wait(_READ_SECONDS)
    finally:
        await follower.stop()


async def write_catalog(kafka: KafkaSettings, catalog: IndexCatalog, now_ns: int) -> IndexCatalog:
    """Write the catalog; returns it as written. One operator at a time: the last write counts.

    Raises:
        LogError: Kafka did not acknowledge it.
    """
    made = msgspec.structs.replace(catalog, updated_ns=max(now_ns, catalog.updated_ns + 1))
    await _send(kafka, topics.WORKERS, {CATALOG_KEY: records.encode(made)})
    return made


async def start_version(
    kafka: KafkaSettings,
    app: str,
    name: str,
    *,
    block_size_tokens: int,
    partitions: int,
    clock_ns: Callable[[], int],
) -> IndexCatalog:
    """Make the topics of a new version and enter it in the catalog.

    Args:
        kafka: how to reach Kafka.
        app: the workers' app name.
        name: of the new version.
        block_size_tokens: its canonical block size.
        partitions: of its block updates and its index.
        clock_ns: wall clock, ns since the epoch.

    Raises:
        ReindexError: the name cannot be used, or is taken by a version with other parameters.
        LogError: Kafka did not answer.
    """
    if not re.fullmatch(topics.VERSION_NAME, name) or name == BASE_VERSION:
        raise ReindexError(
            f"index version {name!r}: give lower-case letters, digits and dashes, at most 32, not 'base'"
        )
    catalog = await read_catalog(kafka)
    made = IndexVersion(block_size_tokens=block_size_tokens, partitions=partitions, created_ns=clock_ns())
    if (known := catalog.versions.get(name)) is not None:
        if (known.block_size_tokens, known.partitions) != (block_size_tokens, partitions):
            raise ReindexError(
                f"index version {name} exists with {known.block_size_tokens}-token blocks in {known.partitions} "
                f"partitions; `kvatlas reindex drop {name}` first, or choose another name"
            )
        return catalog
    engine, index, blocks = topics.version_topics(app, name)
    by_pod = msgspec.structs.replace(kafka, partitions=await _partitions(kafka, topics.EVENTS))
    await ensure_topics(by_pod, [engine])
    await ensure_topics(msgspec.structs.replace(kafka, partitions=partitions), [index, blocks])
    versions = {**catalog.versions, name: made}
    return await write_catalog(kafka, msgspec.structs.replace(catalog, versions=versions), clock_ns())


async def drop_version(kafka: KafkaSettings, app: str, name: str, now_ns: int) -> None:
    """Take a version out of the catalog and delete its topics and pod records.

    Raises:
        ReindexError: there is no such version, or it is the one that answers.
        LogError: Kafka did not answer.
    """
    catalog = await read_catalog(kafka)
    if name not in catalog.versions:
        raise ReindexError(f"there is no index version {name!r}; `kvatlas reindex status` lists them")
    if name == catalog.active:
        raise ReindexError(f"index version {name} answers queries; `kvatlas reindex switch` to another one first")
    rest = {known: version for known, version in catalog.versions.items() if known != name}
    await write_catalog(kafka, msgspec.structs.replace(catalog, versions=rest), now_ns)
    names = [kafka.topic(topic.name) for topic in topics.version_topics(app, name)]
    async with admin_of(kafka) as admin:
        reply = await admin.delete_topics(names)
    for topic, code in reply.topic_error_codes:
        if code not in (0, UnknownTopicOrPartitionError.errno):
            raise LogError(f"topic {topic} could not be deleted: {for_code(code).__name__}; try `reindex drop` again")
    await _forget_pods(kafka, pod_ids.streams_writer(name))


async def _forget_pods(kafka: KafkaSettings, writer: str) -> None:
    """Write tombstones for the pod records of a version's resolve agents."""
    start = f"{writer}|".encode()
    found: set[bytes] = set()

    def note(key: bytes | None, value: bytes | None) -> None:
        if key is not None and key.startswith(start):
            found.add(key) if value else found.discard(key)

    await _read(kafka, topics.PODS, note)
    await _send(kafka, topics.PODS, dict.fromkeys(found))


async def _send(kafka: KafkaSettings, topic: str, values: dict[bytes, bytes | None] | dict[bytes, bytes]) -> None:
    """Write records of a by-pod topic: the key after its writer places them."""
    count = await _partitions(kafka, topic)
    producer = await started_producer(kafka, _CLIENT_ID, acks="all")
    try:
        for key, value in values.items():
            place = key.decode(errors="replace").rpartition("|")[2]
            await send_record(producer, kafka.topic(topic), key, value, pod_ids.pod_partition(place, count))
    finally:
        await producer.stop()


async def _partitions(kafka: KafkaSettings, topic: str) -> int:
    name = kafka.topic(topic)
    async with admin_of(kafka) as admin:
        found = await admin.describe_topics([name])
    if found[0]["error_code"] or not found[0]["partitions"]:
        raise LogError(f"topic {name} does not exist on {kafka.brokers}; `kvatlas topics` creates it")
    return len(found[0]["partitions"])


async def configured(kafka: KafkaSettings, settings: WorkerSettings) -> WorkerSettings:
    """Return a worker's settings with what the catalog says of its index version.

    Raises:
        ReindexError: the catalog has no such version.
        LogError: Kafka does not answer.
    """
    if settings.index_version == BASE_VERSION:
        return settings
    catalog = await read_catalog(kafka)
    version = catalog.versions.get(settings.index_version)
    if version is None:
        raise ReindexError(
            f"there is no index version {settings.index_version!r}; begin it with "
            f"`kvatlas reindex start {settings.index_version}`"
        )
    return msgspec.structs.replace(settings, block_size_tokens=version.block_size_tokens)


@asynccontextmanager
async def admin_of(kafka: KafkaSettings) -> AsyncIterator[Any]:
    """An admin client, connected.

    Raises:
        LogError: Kafka refused or did not answer.
    """
    admin = AIOKafkaAdminClient(**client_config(kafka, _CLIENT_ID))
    try:
        await start_client(admin)
        yield admin
    except (KafkaError, OSError) as error:
        raise LogError(f"the brokers at {kafka.brokers} did not answer: {error!r}") from error
    finally:
        await admin.close()
