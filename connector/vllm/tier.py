"""vLLM's secondary tier on ours: primary host memory <-> verified files, or objects.

Configured with ``kv_connector_extra_config``::

    {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": N, "secondary_tiers": [
        {"type": "FileTierManager", "module_path": "kvatlas.connector.vllm_tier", "root_dir": "/mnt/kv"}]}

``root_dir`` is a folder or ``s3://bucket/prefix``.

Runs in the scheduler process. Its methods only queue work and collect results; a failed load is reported per key, so
vLLM computes those blocks again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kvatlas.connector.vllm.version import check_version

VLLM_VERSION = check_version()

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (  # noqa: E402 - version first
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    ConfigInfo,
    ConfigInfoMapping,
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager  # noqa: E402
from vllm.v1.kv_offload.tiering.base import (  # noqa: E402
    JobResult,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402

from kvatlas.connector.files.blocks import BlockBuffers  # noqa: E402
from kvatlas.connector.files.blocktier import BlockTier  # noqa: E402
from kvatlas.connector.files.catalog import DiskBudget  # noqa: E402
from kvatlas.connector.files.holdings import Change  # noqa: E402
from kvatlas.connector.files.layout import Fingerprint  # noqa: E402
from kvatlas.connector.files.pool import numa_cpus  # noqa: E402
from kvatlas.connector.files.settings import FileTierSettings  # noqa: E402
from kvatlas.connector.files.tier import FileTier  # noqa: E402
from kvatlas.connector.outcome import Outcome, Results  # noqa: E402

_METRIC_PREFIX = "vllm:kvatlas_file_"
#: Figures that our tiers count under their own kind's name, ``file_store_bytes`` or ``object_store_bytes``.
_OF_KIND = "file_"
_COUNTERS = {
    "hits": "Blocks read back and verified.",
    "misses": "Loads of blocks that were not there or did not verify.",
    "corrupt": "Files that did not verify and were quarantined.",
    "failed": "Blocks whose transfer the file system failed.",
    "shed": "Stores dropped under pressure.",
    "evicted": "Blocks evicted.",
    "file_store_bytes": "Bytes stored.",
    "file_store_seconds": "Thread time of stores in seconds.",
    "file_load_bytes": "Bytes loaded.",
    "file_load_seconds": "Thread time of loads in seconds.",
}
_GAUGES = {
    "queued_reads": "Loads and lookups that wait for a thread.",
    "queued_writes": "Stores that wait for a thread.",
    "file_used_bytes": "Bytes of the files known.",
}


def _metric(name: str) -> str:
    return _METRIC_PREFIX + name.removeprefix("file_")


def fingerprint_of(spec: OffloadingSpec, block_bytes: int) -> Fingerprint:
    """Return what decides whether this engine's stored bytes mean the same to another.

    A block of the tier is the whole chunk of every worker on this node, so the rank is ``all``.
    """
    config = spec.config
    parallel = config.parallel
    extra = {
        "blocks_per_chunk": str(config.cache.blocks_per_chunk),
        "tokens_per_hash": str(config.cache.tokens_per_hash),
        "worker_kv_bytes_per_block": str(config.worker_kv_bytes_per_block),
        "world_size": str(parallel.world_size),
        "replicated_layout": str(config.replicated_layout),
        "canonical_layout": str(config.canonical_layout),
    }
    return Fingerprint(
        engine="vllm",
        engine_version=VLLM_VERSION,
        model=config.model.name,
        # The specs' configuration lacks prefix_caching_hash_algo, and no vLLM configuration is current in this process.
        hash_algorithm=str(spec.extra_config.get("hash_algorithm", "sha256")),
        hash_seed=os.environ.get("PYTHONHASHSEED", ""),  # vLLM itself reads its hash seed there
        dtype=config.model.dtype,
        block_size_tokens=tuple(group.tokens_per_block for group in config.groups),
        layers=tuple(tuple(group.layer_names) for group in config.groups),
        tensor_parallel=parallel.tp_size,
        pipeline_parallel=parallel.pp_size,
        prefill_context_parallel=parallel.pcp_size,
        decode_context_parallel=parallel.dcp_size,
        rank="all",
        block_bytes=block_bytes,
        memory_layout=config.kv_cache_layout or "",
        extra=extra,
    )


def settings_of(root_dir: str, options: Mapping[str, Any]) -> FileTierSettings:
    """Return the file tier's settings from a tier's JSON configuration."""
    known = dict(options)
    budget = DiskBudget(
        max_bytes=known.pop("max_bytes", None),
        max_percent=known.pop("max_percent", 80.0),
        high_watermark=known.pop("high_watermark", 0.95),
        low_watermark=known.pop("low_watermark", 0.85),
    )
    cpus = tuple(known.pop("cpus", ()))
    node = known.pop("numa_node", None)
    if node is not None and not cpus:
        cpus = numa_cpus(int(node))
    return FileTierSettings(root=Path(root_dir), budget=budget, cpus=cpus, **known)


def open_tier(
    root_dir: str, options: Mapping[str, Any], fingerprint: Fingerprint, listener: Callable[[Change], None]
) -> BlockTier:
    """Return the tier at a folder or an ``s3://`` address.

    Raises:
        SettingsError: the address or an option is not one.
        LayoutError: what is there belongs to another engine set-up.
    """
    if "://" not in root_dir:
        return FileTier(settings_of(root_dir, options), fingerprint, listener=listener)
    from kvatlas.connector.objects.settings import ObjectTierSettings  # noqa: PLC0415 - needs obstore
    from kvatlas.connector.objects.tier import ObjectTier  # noqa: PLC0415

    return ObjectTier(ObjectTierSettings(url=root_dir, **options), fingerprint, listener=listener)


@dataclass(frozen=True)
class TierInfo(ConfigInfo):  # type: ignore[misc]
    """Labels of our series of ``vllm:kv_offload_config_info``.

    Attributes:
        kvatlas_kind: ``file`` or ``object``.
        kvatlas_root: the folder or address.
        kvatlas_fingerprint: the directory below it, which engines share whose blocks mean the same.
        kvatlas_locality: ``LOCAL`` or ``REMOTE``.
        kvatlas_writable: whether blocks can be stored.
        kvatlas_direct: whether files are read and written past the page cache.
    """

    kvatlas_kind: str
    kvatlas_root: str
    kvatlas_fingerprint: str
    kvatlas_locality: str
    kvatlas_writable: bool
    kvatlas_direct: bool


class _Running(NamedTuple):
    keys: tuple[OffloadKey, ...]
    is_load: bool
    begin: float


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    def __init__(self, tier: BlockTier, tier_type: str) -> None:
        self._files = tier
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:  # noqa: ARG002
        found = self._files.lookup(keys)
        return [found[key] for key in keys]


class FileTierManager(SecondaryTierManager):  # type: ignore[misc]
    """The secondary tier that vLLM's tiering manager talks to."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(  # noqa: PLR0917 - vLLM's signature
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        enable_kv_events: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        remote = "://" in root_dir
        self.locality = Locality(locality or ("REMOTE" if remote else "LOCAL"))
        if self.locality is Locality.REMOTE:
            # vLLM's own word for a remote store; what lies on this node's disk keeps the one of its medium.
            self.cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED
        events = enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if events else None
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._finished: list[tuple[int, Results, float]] = []
        self._reported: dict[str, float] = {}
        self._rows = primary_kv_view.cast("B") if primary_kv_view.format != "B" else primary_kv_view
        if self._rows.ndim != 1:
            self._rows = self._rows.cast("B")
        fingerprint = fingerprint_of(offloading_spec, self.block_size_bytes)
        self.files = open_tier(root_dir, options, fingerprint, self._on_change)
        self._info = TierInfo(
            kvatlas_kind=self.files.kind,
            kvatlas_root=root_dir,
            kvatlas_fingerprint=fingerprint.directory(),
            kvatlas_locality=self.locality.value,
            kvatlas_writable=not self.files.read_only,
            kvatlas_direct=bool(getattr(self.files, "direct", False)),
        )
        self._lookups = _Lookups(self.files, tier_type)

    def _row(self, chunk: int) -> memoryview:
        at = chunk * self.block_size_bytes
        return self._rows[at : at + self.block_size_bytes]

    def _on_change(self, change: Change) -> None:
        if self._events is None:
            return
        event = OffloadingEvent(
            keys=[OffloadKey(key) for key in change.keys],
            medium=Medium.STORAGE,
            removed=change.removed,
            locality=self.locality,
        )
        with self._lock:
            self._events.append(event)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT, MISS, or RETRY while an I/O thread looks; a HIT is verified when it is promoted."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queue the write of chunks from primary memory."""
        self._submit(job_metadata, self.files.store, is_load=False)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Queue the read of chunks into primary memory."""
        self._submit(job_metadata, self.files.load, is_load=True)

    def _submit(
        self, job: TransferJob, work: Callable[[list[BlockBuffers]], Future[Results]], *, is_load: bool
    ) -> None:
        keys = tuple(job.keys)
        blocks = [BlockBuffers(key, [self._row(int(chunk))]) for key, chunk in zip(keys, job.chunk_ids, strict=True)]
        begin = time.monotonic()
        self._running[job.job_id] = _Running(keys, is_load, begin)
        work(blocks).add_done_callback(lambda future: self._done(job.job_id, future))

    def _done(self, job_id: int, future: Future[Results]) -> None:
        with self._lock:
            self._finished.append((job_id, future.result(), time.monotonic()))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return what ended since the last call; a load names the keys whose bytes verified."""
        with self._lock:
            finished, self._finished = self._finished, []
        return [self._result(job_id, results, end) for job_id, results, end in finished]

    def _result(self, job_id: int, results: Results, end: float) -> JobResult:
        job = self._running.pop(job_id)
        good = tuple(key for key in job.keys if results[key].ok)
        if job.is_load and len(good) < len(job.keys):
            self._lookups.mark_miss([key for key in job.keys if not results[key].ok])
        moved = sum(results[key].outcome is not Outcome.EXISTS for key in good)
        return JobResult(
            job_id=job_id,
            success=len(good) == len(job.keys),
            successful_keys=good if job.is_load and good and len(good) < len(job.keys) else None,
            transfer_time=end - job.begin,
            transfer_bytes=moved * self.block_size_bytes,
        )

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:  # noqa: ARG002
        """Keep what nearer tiers serve young here too."""
        self.files.touch(keys)

    def has_pending_work(self) -> bool:
        """Whether an idle engine is to step once more: events wait, and only a step publishes them."""
        with self._lock:
            return bool(self._events)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return what was stored and removed since the last call, in order."""
        if self._events is None:
            return ()
        with self._lock:
            events, self._events = self._events, []
        return events

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:  # noqa: ARG002
        """Ask for vLLM's default: store newly computed chunks."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget the request's lookups."""
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002
        """Send this step's lookups to their thread."""
        self._lookups.flush()

    def drain_jobs(self) -> None:
        """Wait until no I/O touches primary memory."""
        self.files.drain()

    def shutdown(self) -> None:
        """End the threads; transfers that have not begun are cancelled."""
        self._lookups.shutdown()
        self.files.close()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:  # noqa: ARG003
        """Return the definitions of the tier's own metrics."""
        counters = {_metric(name): OffloadingCounterMetadata(documentation=text) for name, text in _COUNTERS.items()}
        return counters | {_metric(name): OffloadingGaugeMetadata(documentation=text) for name, text in _GAUGES.items()}

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:  # noqa: ARG003
        """Return the label names of :meth:`config_info`."""
        names: tuple[str, ...] = TierInfo.config_info_keys()
        return names

    def config_info(self) -> ConfigInfoMapping:
        """Return what this tier is, as labels of vLLM's info metric."""
        return self._info.as_config_info()

    def get_stats(self) -> OffloadingConnectorStats:
        """Return the counters' growth, and the gauges that changed, since the last call."""
        stats = OffloadingConnectorStats()
        found = self.files.metrics.snapshot()
        now = {_OF_KIND + name.removeprefix(f"{self.files.kind}_"): value for name, value in found.items()} | found
        for name in _COUNTERS:
            growth = now.get(name, 0.0) - self._reported.get(name, 0.0)
            if growth:
                stats.increase_counter(_metric(name), growth)
        for name in _GAUGES:
            if now[name] != self._reported.get(name):
                stats.set_gauge(_metric(name), now[name])
        self._reported = now
        return stats
