"""Settings of a stream worker: section ``worker``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import Section

MIB = 1024 * 1024


class WorkerSettings(Section, frozen=True, kw_only=True):
    """What one ``kvatlas worker`` does and how much it may use."""

    app: Annotated[str, Meta(description="name of the app: consumer group and prefix of the changelog topics")] = (
        "kvatlas"
    )
    index_version: Annotated[
        str,
        Meta(
            description="index version that this worker keeps, see `kvatlas reindex`",
            pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        ),
    ] = topics.BASE_VERSION
    role: Annotated[
        Literal["all", "resolve", "index"],
        Meta(description="agents of this worker; one deployment runs either only `all` or the two others"),
    ] = "all"
    state_dir: Annotated[str, Meta(description="folder of the local tables; may be lost, Kafka has it all")] = (
        "kvatlas-state"
    )
    processes: Annotated[
        int, Meta(description="worker processes on this machine, each with its own folder w0, w1, ...", ge=1, le=256)
    ] = 1
    listen: Annotated[str, Meta(description="address of the lookup service, host:port; port 0 takes a free one")] = (
        "127.0.0.1:0"
    )
    advertise: Annotated[str, Meta(description="host[:port] that scorers reach; empty: as bound")] = ""
    telemetry_listen: Annotated[
        str, Meta(description="address of /metrics, /healthz and /readyz, host:port; empty: none")
    ] = ""
    reflection: Annotated[bool, Meta(description="serve gRPC reflection")] = False
    max_lookup_keys: Annotated[int, Meta(description="largest lookup, in keys", ge=1, le=1_000_000)] = 16_384
    block_size_tokens: Annotated[int, Meta(description="tokens in a canonical block", ge=1, le=4096)] = 16

    announcements: Annotated[
        Literal["auto", "copies", "presence"],
        Meta(
            description="what an engine's repeated store means: one more copy to be removed, still there, or "
            "(auto) one more copy unless its place in the stream shows a report of what is there"
        ),
    ] = "auto"
    clears: Annotated[
        Literal["engine", "all", "gpu"],
        Meta(
            description="tiers that an engine's clear of its prefix cache ends; engine: the GPU of vLLM, all but "
            "the shared ones of SGLang"
        ),
    ] = "engine"
    strict_gaps: Annotated[bool, Meta(description="an unrepaired gap ends all older entries of the pod")] = False
    default_store: Annotated[str, Meta(description="shared store of pods that announce shared blocks")] = "default"
    orphan_blocks: Annotated[
        int, Meta(description="blocks per pod that may wait for their parent", ge=0, le=10_000_000)
    ] = 8_192

    session_timeout_seconds: Annotated[
        float, Meta(description="silence after which a worker's partitions go to others", ge=1, le=3600)
    ] = 6.0
    heartbeat_seconds: Annotated[float, Meta(description="how often a worker says it lives", gt=0, le=600)] = 2.0
    request_timeout_seconds: Annotated[float, Meta(description="wait for an answer of Kafka", ge=1, le=3600)] = 30.0
    fetch_wait_ms: Annotated[int, Meta(description="how long a fetch waits at the broker for records", ge=1)] = 50
    standbys: Annotated[int, Meta(description="copies of each partition on other workers", ge=0, le=16)] = 0

    cache_bytes: Annotated[int, Meta(description="write-through cache of both tables, bytes of memory", ge=0)] = (
        384 * MIB
    )
    rocksdb_cache_bytes: Annotated[int, Meta(description="RocksDB block cache, all partitions together", ge=0)] = (
        64 * MIB
    )
    write_buffer_bytes: Annotated[int, Meta(description="RocksDB memtables, all partitions together", ge=MIB)] = (
        128 * MIB
    )
    max_local_age_hours: Annotated[
        float,
        Meta(description="local state older than this is rebuilt: the changelog drops tombstones after a day", gt=0),
    ] = 12.0

    commit_interval_ms: Annotated[
        int,
        Meta(
            description="least time between two commits of a partition unless a flush is full; lookups do not wait",
            ge=0,
            le=10_000,
        ),
    ] = 100
    flush_records: Annotated[int, Meta(description="largest flush of a partition, in source records", ge=1)] = 256
    flush_updates: Annotated[int, Meta(description="largest flush of a partition, in updates", ge=1)] = 8_192
    slice_updates: Annotated[
        int, Meta(description="updates applied before the worker looks after lookups again", ge=1)
    ] = 2_048
    buffer_records: Annotated[int, Meta(description="source records read ahead per agent", ge=1)] = 4_096
    batch_bytes: Annotated[
        int, Meta(description="largest changelog batch; topics must allow it", ge=MIB, le=1024 * MIB)
    ] = 24 * MIB

    mirror: Annotated[
        str,
        Meta(description="Redis or Valkey server that gets a copy of the index, redis:// or rediss://; empty: none"),
    ] = ""
    mirror_prefix: Annotated[str, Meta(description="before every key of the mirror")] = "kvatlas"
    mirror_password_file: Annotated[str, Meta(description="file that holds the mirror's password")] = ""
    mirror_cafile: Annotated[
        str, Meta(description="CA certificates (PEM) of a rediss:// mirror; empty: the system's")
    ] = ""
    mirror_pending_keys: Annotated[
        int, Meta(description="changed keys that may wait for the mirror; beyond it is copied again", ge=1_000)
    ] = 1_000_000

    pod_record_interval_seconds: Annotated[
        float, Meta(description="least time between two pod records of one pod; epochs go at once", ge=0)
    ] = 0.2
    announce_seconds: Annotated[float, Meta(description="how often the worker announces itself", gt=0)] = 2.0
    announce_expiry_seconds: Annotated[float, Meta(description="how long an announcement holds", gt=0)] = 10.0
    census_seconds: Annotated[
        float, Meta(description="how often the blocks per pod and tier are counted; 0 turns it off", ge=0)
    ] = 10.0
    sweep_interval_seconds: Annotated[float, Meta(description="pause between two sweeps of a partition", gt=0)] = 60.0
    sweep_entries_per_second: Annotated[
        int, Meta(description="entries that the sweep looks at in a second; 0 turns it off", ge=0)
    ] = 20_000

    forget_gone_hours: Annotated[
        float, Meta(description="state and positions of a pod that has been gone this long are dropped", gt=0)
    ] = 24.0

    @property
    def versioned_app(self) -> str:
        """Name that this index version's consumer groups and changelogs begin with."""
        return topics.version_app(self.app, self.index_version)

    @property
    def blocks_topic(self) -> str:
        """Topic of this index version's block updates, before the deployment's prefix."""
        return topics.blocks_topic(self.index_version)

    def __post_init__(self) -> None:
        """Check settings against each other.

        Raises:
            ValueError: two settings contradict each other.
        """
        if self.heartbeat_seconds * 2 > self.session_timeout_seconds:
            raise ValueError("heartbeat_seconds must be at most half of session_timeout_seconds")
        if self.session_timeout_seconds > self.request_timeout_seconds:
            raise ValueError("session_timeout_seconds must not be above request_timeout_seconds")
        if self.announce_expiry_seconds < 2 * self.announce_seconds:
            raise ValueError("announce_expiry_seconds must be at least twice announce_seconds")
