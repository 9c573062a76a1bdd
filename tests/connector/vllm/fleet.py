"""vLLM's real scheduler and OffloadingConnector on the CPU; the model runner is played, its memory is an array."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_events import KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_offload.base import LookupResult, make_offload_key
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_TOKENS = 16
HEADS, HEAD_SIZE = 2, 64
PAGE_BYTES = 2 * BLOCK_TOKENS * HEADS * HEAD_SIZE * 2
GPU_BLOCKS, HOST_CHUNKS = 48, 40


def content(tokens: list[int]) -> bytes:
    """Return what the KV block that ends this prefix holds: a function of every token before it."""
    seed = hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8], "big"))).bytes(PAGE_BYTES)


def make_scheduler(root: Path | str, scratch: Path, *, whole_spec: bool = False, **tier: Any) -> Scheduler:
    """Return a scheduler whose connector spills to our file tier below ``root``."""
    model = scratch / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
            "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1,
            "vocab_size": 32000, "max_position_embeddings": 2048, "torch_dtype": "float16", "head_dim": 64,
        })
    )  # fmt: skip
    model_config = ModelConfig(
        model=str(model), tokenizer=str(model), skip_tokenizer_init=True, dtype="float16", seed=0, max_model_len=512
    )
    config = VllmConfig(
        model_config=model_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=1024, max_model_len=512, enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config=_extra(root, tier, whole_spec=whole_spec),
        ),
    )  # fmt: skip
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float16)
    kv_cache = KVCacheConfig(
        num_blocks=GPU_BLOCKS,
        kv_cache_tensors=[KVCacheTensor(GPU_BLOCKS * PAGE_BYTES, ["layer"], GPU_BLOCKS * PAGE_BYTES, PAGE_BYTES)],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    assert spec.page_size_bytes == PAGE_BYTES
    config.cache_config.num_gpu_blocks = GPU_BLOCKS
    return Scheduler(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        log_stats=True,
    )


def _extra(root: Path | str, tier: dict[str, Any], *, whole_spec: bool) -> dict[str, Any]:
    size = {"cpu_bytes_to_use": HOST_CHUNKS * max(PAGE_BYTES, 4096)}
    if whole_spec:
        return {
            "spec_name": "FileOffloadingSpec",
            "spec_module_path": "kvatlas.connector.vllm_spec",
            "root_dir": str(root),
            "file_tier": {"threads": 2, **tier},
            **size,
        }
    ours = {"type": "FileTierManager", "module_path": "kvatlas.connector.vllm_tier", "root_dir": str(root)}
    return {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{**ours, "threads": 2, **tier}], **size}


class Runner:
    """Plays the model runner and the connector's worker, and checks every byte that a load brings."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory = np.zeros((GPU_BLOCKS, PAGE_BYTES), dtype=np.uint8)
        self.manager = scheduler.connector.connector_scheduler.manager
        self.host = np.frombuffer(self.manager.primary_tier.get_kv_memoryview(), dtype=np.uint8)
        self.host = self.host.reshape(-1, self.manager.primary_tier.get_kv_memoryview().strides[0])
        self.files = self.manager.secondary_tiers[0].files
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.loaded = self.stored = 0
        self.events: list[Any] = []
        self.payloads: list[bytes] = []
        self.stats: list[dict[str, Any]] = []
        scheduler.kv_event_publisher = self
        self.truth: dict[bytes, bytes] = {}
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self._number = 0

    def publish(self, batch: KVEventBatch) -> None:
        """Take what the scheduler publishes, as the publisher would send it (the scheduler's publisher)."""
        self.payloads.append(msgspec.msgpack.encode(batch))
        self.events.extend(batch.events)

    def shutdown(self) -> None:
        """End the publisher's part."""

    def add(self, tokens: list[int], **transfer: Any) -> None:
        """Add a request, with what it says of its transfers (``kv_transfer_params``)."""
        self._number += 1
        name = f"r{self._number}"
        self.tokens[name] = tokens
        extra = {"kv_transfer_params": transfer} if transfer else None
        parameters = SamplingParams(max_tokens=1, ignore_eos=True, extra_args=extra)
        parameters.update_from_generation_config({}, eos_token_id=50)
        request = Request(name, tokens, parameters, None, block_hasher=self._hasher)
        for number, found in enumerate(request.block_hashes):
            key = make_offload_key(found, 0)
            if key not in self.truth:
                self.truth[key] = content(tokens[: (number + 1) * BLOCK_TOKENS])
        self.scheduler.add_request(request)

    def _transfer(self, metadata: Any, done: OffloadingWorkerMetadata) -> set[str]:
        received: set[str] = set()
        for number, job in metadata.load_jobs.items():
            first = int(job.dst_spec.block_indices[0])
            for at, (chunk, block) in enumerate(zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True)):
                end = (first + at + 1) * BLOCK_TOKENS
                found = self.host[chunk, :PAGE_BYTES]
                assert found.tobytes() == content(self.tokens[job.req_id][:end]), "a load brought other bytes"
                self.memory[block] = found
                self.loaded += 1
            done.mark_completed(number)
            if not job.sync:
                received.add(job.req_id)
        return received

    def _store(self, metadata: Any, done: OffloadingWorkerMetadata) -> None:
        for number, job in metadata.store_jobs.items():
            for block, chunk in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
                self.host[chunk, :PAGE_BYTES] = self.memory[block]
                self.stored += 1
            done.mark_completed(number)

    def step(self) -> None:
        output = self.scheduler.schedule()
        for request in output.scheduled_new_reqs:
            self.blocks[request.req_id] = list(request.block_ids[0])
        cached = output.scheduled_cached_reqs
        for name, fresh in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.blocks[name] = []
            self.blocks[name] += list(fresh[0]) if fresh else []
        done = OffloadingWorkerMetadata()
        metadata = output.kv_connector_metadata
        received = self._transfer(metadata, done) if metadata is not None else set()
        sampled = []
        names = list(output.num_scheduled_tokens)
        begins = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        begins.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name in names:
            tokens, begin = self.tokens[name], begins[name]
            end = begin + output.num_scheduled_tokens[name]
            for number in range(begin // BLOCK_TOKENS, min(end, len(tokens)) // BLOCK_TOKENS):
                data = content(tokens[: (number + 1) * BLOCK_TOKENS])
                self.memory[self.blocks[name][number]] = np.frombuffer(data, dtype=np.uint8)
            sampled.append([7] if end >= len(tokens) else [])
        if metadata is not None:
            self._store(metadata, done)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: number for number, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(
                finished_recving=received or None, kv_connector_worker_meta=done if done.completed_jobs else None
            ),
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            if outputs.scheduler_stats is not None and outputs.scheduler_stats.kv_connector_stats:
                self.stats.append(outputs.scheduler_stats.kv_connector_stats)
        if not names:
            time.sleep(0.0005)

    def run(self, prompts: list[list[int]], at_once: int = 4, on_step: Any = None) -> None:
        waiting = list(reversed(prompts))
        while waiting or self.scheduler.has_unfinished_requests():
            while waiting and len(self.scheduler.requests) < at_once:
                self.add(waiting.pop())
            self.step()
            if on_step is not None:
                on_step()


class Witness:
    """Compares host memory with the truth whenever the manager promises a block or our tier reports a load.

    Attributes:
        promised: lookups that said HIT.
        loaded, failed: blocks of finished loads, as our tier reported them.
    """

    def __init__(self, runner: Runner) -> None:
        self.promised = self.loaded = self.failed = 0
        self._runner = runner
        manager, tier = runner.manager, runner.manager.secondary_tiers[0]
        lookup, submit, finished = manager.lookup, tier.submit_load, tier.get_finished_jobs
        jobs: dict[int, dict[bytes, int]] = {}

        def watched_lookup(key: Any, context: Any, **more: Any) -> Any:
            found = lookup(key, context, **more)
            if found is LookupResult.HIT:
                self.promised += 1
                self._check(key, manager.primary_tier._policy.get(key).chunk_id)
            return found

        def watched_submit(job: Any) -> None:
            jobs[job.job_id] = dict(zip(job.keys, map(int, job.chunk_ids), strict=True))
            submit(job)

        def watched_finished() -> list[Any]:
            results = list(finished())
            for result in results:
                chunks = jobs.pop(result.job_id, {})
                good = chunks if result.success else result.successful_keys or ()
                for key in good:
                    self._check(key, chunks[key])
                self.loaded += len(good)
                self.failed += len(chunks) - len(good)
            return results

        manager.lookup = watched_lookup
        tier.submit_load = watched_submit
        tier.get_finished_jobs = watched_finished

    def _check(self, key: bytes, chunk: int) -> None:
        found = self._runner.host[chunk, :PAGE_BYTES].tobytes()
        assert found == self._runner.truth[key], "promised before it was verified"


def prompts(seed: int, count: int, documents: int = 24) -> list[list[int]]:
    """Return prompts that share long prefixes: a document, cut at some block, and a few tokens of their own."""
    chosen = random.Random(seed)
    texts = [
        [random.Random(number).randrange(1000, 30_000) for number in range(d, d + 160)]
        for d in range(0, documents * 1000, 1000)
    ]
    return [
        chosen.choice(texts)[: 16 * chosen.randint(2, 10)] + [chosen.randrange(1000, 30_000) for _ in range(5)]
        for _ in range(count)
    ]
