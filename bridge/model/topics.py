"""Topics of the system and the headers of their records: every name, each defined once, here."""

from __future__ import annotations

from typing import Final

import msgspec


class Topic(msgspec.Struct, frozen=True):
    """How one topic is declared.

    Attributes:
        name: the topic's name (before the deployment's prefix).
        by: what it is partitioned by: ``pod`` or ``block``.
        cleanup: Kafka's ``cleanup.policy``.
        retention_hours: how long records stay; 0 keeps them (compacted topics).
        max_message_bytes: largest record batch.
    """

    name: str
    by: str
    cleanup: str = "delete"
    retention_hours: int = 0
    max_message_bytes: int = 32 * 1024 * 1024


EVENTS: Final = "kv-events"
DLQ: Final = "kv-events-dlq"
PODS: Final = "kv-pods"
BLOCKS: Final = "kv-blocks"
WORKERS: Final = "kv-workers"
DECISIONS: Final = "kv-decisions"
TOPICS: Final = (
    Topic(EVENTS, "pod", retention_hours=24),
    Topic(DLQ, "pod", retention_hours=24 * 7),
    Topic(PODS, "pod", cleanup="compact"),
    Topic(BLOCKS, "block", retention_hours=6),
    Topic(WORKERS, "pod", cleanup="compact"),
    Topic(DECISIONS, "pod", retention_hours=24),
)


def changelog_topics(app: str) -> tuple[Topic, Topic]:
    """Return the changelogs of an app's tables: ``engine_blocks`` by pod, ``block_index`` by block."""
    return (
        Topic(f"{app}-engine_blocks-changelog", "pod", cleanup="compact"),
        Topic(f"{app}-block_index-changelog", "block", cleanup="compact"),
    )


#: The index version that a deployment begins with; its topics have no suffix.
BASE_VERSION: Final = "base"
#: Names of index versions; they become part of topics' names.
VERSION_NAME: Final = r"^[a-z0-9][a-z0-9-]{0,31}$"


def blocks_topic(version: str) -> str:
    """Return the topic of an index version's block updates: ``kv-blocks``, or ``kv-blocks.<version>``."""
    return BLOCKS if version == BASE_VERSION else f"{BLOCKS}.{version}"


def version_app(app: str, version: str) -> str:
    """Return the app name of an index version: its consumer groups and changelogs begin with it."""
    return app if version == BASE_VERSION else f"{app}.{version}"


def version_topics(app: str, version: str) -> tuple[Topic, Topic, Topic]:
    """Return the topics that belong to one index version alone: two changelogs and its block updates.

    The first is by pod and has as many partitions as ``kv-events``; the others are by block.
    """
    blocks = next(topic for topic in TOPICS if topic.name == BLOCKS)
    engine, index = changelog_topics(version_app(app, version))
    return engine, index, msgspec.structs.replace(blocks, name=blocks_topic(version))


H_SEQUENCE: Final = "sequence"  # decimal text, the publisher's counter
H_ENGINE_TOPIC: Final = "engine_topic"  # the ZMQ topic frame as received
H_RECEIVE_NS: Final = "receive_ns"  # decimal text, the bridge's wall clock in ns
H_SOURCE: Final = "source"  # live | replay
H_CONTENT_TYPE: Final = "content_type"  # see below
H_INCARNATION: Final = "incarnation"  # decimal text, high half of the epoch
H_ENGINE: Final = "engine"  # adapter name
H_MODEL: Final = "model"  # model name
H_STORE: Final = "store"  # shared store that the pod mounts; absent for the deployment's default
H_ANNOUNCEMENTS: Final = "announcements"  # auto | copies | presence; absent for the deployment's default
H_BLOCKS_PER_CHUNK: Final = (
    "blocks_per_chunk"  # decimal text, engine blocks in an offload chunk; absent where events say it
)
H_COMPUTES_AGAIN: Final = "computes_again"  # 1: the engine computes the last block that it matched again
H_REASON: Final = "reason"  # DLQ: why
H_ORIGIN: Final = "origin"  # DLQ: topic/partition/offset it came from, or the endpoint
SOURCE_LIVE: Final = "live"
SOURCE_REPLAY: Final = "replay"
#: Holders that several pods load from: cache servers and pools, no engines.
ENGINE_LMCACHE: Final = "lmcache"
ENGINE_MOONCAKE: Final = "mooncake"
CACHE_SERVERS: Final = frozenset({ENGINE_LMCACHE, ENGINE_MOONCAKE})
CONTENT_ENGINE: Final = "engine"  # the engine's message, byte for byte
CONTENT_KEYS: Final = "keys"  # token-free: the bridge computed the block keys (KeyedBatch)
CONTENT_CONTROL: Final = "control"  # a Control record of ours, in order with the pod's messages
Headers = list[tuple[str, bytes]]


def header_number(value: bytes | None, absent: int = -1) -> int:
    """Return the number in a header; ``absent`` where there is none.

    Raises:
        ValueError: it is no decimal number from 0 to 2^62 - 1: what is counted on from it fits 63 bits.
    """
    if value is None:
        return absent
    number = int(value)
    if not 0 <= number < 1 << 62:
        raise ValueError(f"{number.bit_length()} bits")
    return number
