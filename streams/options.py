"""Settings of a stream worker: section ``worker``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import Section

MIB = 1024 * 1024


class WorkerSettings(Section, frozen=True, kw_only=True):
    """What one ``kvatlas worker`` does and how much it may use."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "announce_expiry_seconds", "announce_seconds", "batch_bytes", "buffer_records", "census_seconds",
        "default_store", "fetch_wait_ms", "flush_records", "flush_updates", "heartbeat_seconds",
        "max_local_age_hours", "max_lookup_keys", "mirror_pending_keys", "orphan_blocks",
        "pod_record_interval_seconds", "reflection", "request_timeout_seconds", "rocksdb_cache_bytes",
        "slice_updates", "sweep_entries_per_second", "write_buffer_bytes",
    ))  # fmt: skip

    app: Annotated[str, Meta(description="name of the app: consumer group and prefix of the changelog topics")] = (
        "kvatlas"
    )
    index_version: Annotated[
        str,
        Meta(
            description="index version that this worker keeps, see `kvatlas reindex`",
            pattern=topics.VERSION_NAME,
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

    session_timeout_seconds: Annotated[
        float, Meta(description="silence after which a worker's partitions go to others", ge=1, le=3600)
    ] = 6.0
    standbys: Annotated[int, Meta(description="copies of each partition on other workers", ge=0, le=16)] = 0

    cache_bytes: Annotated[int, Meta(description="write-through cache of both tables, bytes of memory", ge=0)] = (
        384 * MIB
    )

    commit_interval_ms: Annotated[
        int,
        Meta(
            description="least time between two commits of a partition unless a flush is full; lookups do not wait",
            ge=0,
            le=10_000,
        ),
    ] = 500

    mirror: Annotated[
        str,
        Meta(description="Redis or Valkey server that gets a copy of the index, redis:// or rediss://; empty: none"),
    ] = ""
    mirror_prefix: Annotated[str, Meta(description="before every key of the mirror")] = "kvatlas"
    mirror_password_file: Annotated[str, Meta(description="file that holds the mirror's password")] = ""
    mirror_cafile: Annotated[
        str, Meta(description="CA certificates (PEM) of a rediss:// mirror; empty: the system's")
    ] = ""

    sweep_interval_seconds: Annotated[float, Meta(description="pause between two sweeps of a partition", gt=0)] = 60.0

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
