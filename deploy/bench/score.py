"""``kvatlas bench score``: time of a score, over gRPC and in process, beside an empty call to the same server.

The server runs in a process of its own over a table of a million blocks in memory; ``hop`` cases put the table into a
third process behind the lookup protocol. ``inprocess`` leaves gRPC out.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing
import os
import signal
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import grpc.aio

from kvatlas.bridge.block_key import KEY_BYTES, block_keys, partition_of, root_key
from kvatlas.bridge.records import WRITER_STREAMS, PodRecord, WorkerRecord, encode, pod_ref
from kvatlas.scorer.core import Core
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.pods import PodTable
from kvatlas.scorer.reader import LocalLookups, Lookups, PartitionRouter, Seen
from kvatlas.scorer.security import Guard
from kvatlas.scorer.service import ScorerFront
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.scorer.workers import WorkerTable
from kvatlas.streams.codec import pack_holder
from kvatlas.streams.lookups import answer_columns
from kvatlas.streams.v1 import block_index_pb2 as index_pb
from kvatlas.streams.v1 import block_index_pb2_grpc as index_grpc

HELP: Final = "milliseconds per score: gRPC, with a hop, in process, beside an empty call"

_MODEL: Final = "bench"
_PODS: Final = 8
_PARTITIONS: Final = 8
_SIZES: Final = (8192, 32768, 131072)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the table")
    parser.add_argument("--calls", type=int, default=400, help="calls per case at 8,192 tokens, fewer above")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    context = multiprocessing.get_context("spawn")
    for kind in ("grpc", "hop"):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(kind, args.blocks, theirs))
        process.start()
        try:
            yield from _over_grpc(kind, ours.recv(), args.calls)
        finally:
            process.terminate()
            process.join()
    yield asyncio.run(_in_process(args))


def _tokens(count: int) -> bytes:
    return array("I", range(1, count + 1)).tobytes()


def _table(blocks: int) -> dict[bytes, bytes]:
    held = b"".join(sorted(pack_holder(pod_ref(f"pod-{n}"), 0, 1, 0, 0, 0) for n in range(_PODS)))
    table = dict.fromkeys(block_keys(root_key(_MODEL), _tokens(max(_SIZES)), 16), held)
    other = 0
    while len(table) < blocks:
        keys = block_keys(root_key(f"other-{other}"), _tokens(max(_SIZES)), 16)
        table.update(dict.fromkeys(keys[: blocks - len(table)], held))
        other += 1
    return table


def _pods() -> PodTable:
    pods = PodTable()
    for number in range(_PODS):
        name = f"pod-{number}"
        pods.put(WRITER_STREAMS, name, PodRecord(pod=name, writer=WRITER_STREAMS, model=_MODEL, block_size_tokens=16))
    return pods


def _local(blocks: int) -> Lookups:
    table = _table(blocks)
    seen = {number: Seen("active", "bench", 0, 0) for number in range(_PARTITIONS)}
    return LocalLookups(lambda keys: [table.get(key, b"") for key in keys], lambda: seen)


class _Index(index_grpc.BlockIndexServicer):
    def __init__(self, blocks: int) -> None:
        self._table = _table(blocks)

    async def Lookup(self, request: index_pb.LookupRequest, _context: Any) -> index_pb.LookupResponse:  # noqa: N802
        packed = request.keys
        keys = [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]
        values, index = answer_columns([self._table.get(key) for key in keys])
        touched = {partition_of(key, _PARTITIONS) for key in keys}
        states = [index_pb.PartitionState(partition=p, role=index_pb.PartitionState.ACTIVE) for p in touched]
        return index_pb.LookupResponse(values=values, index=index, partitions=states, worker="bench")


async def _index_server(blocks: int, pipe: Connection) -> None:
    server = grpc.aio.server()
    index_grpc.add_BlockIndexServicer_to_server(_Index(blocks), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def _run(work: Callable[[], Any]) -> None:
    import uvloop  # noqa: PLC0415 - in the child only

    uvloop.run(work())


def _serve_index(blocks: int, pipe: Connection) -> None:
    _run(lambda: _index_server(blocks, pipe))


def _serve(kind: str, blocks: int, pipe: Connection) -> None:
    if kind == "grpc":
        lookups = _local(blocks)
        _run(lambda: _score_server(lookups, pipe))
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve_index, args=(blocks, theirs))
    worker.start()

    # Terminated by the parent: take the worker along.
    def leave(_number: int, _frame: object) -> None:
        worker.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    workers = WorkerTable(time.time_ns)
    now = time.time_ns()
    record = WorkerRecord(
        worker="bench",
        endpoint=ours.recv(),
        partitions=list(range(_PARTITIONS)),
        partition_count=_PARTITIONS,
        updated_ns=now,
        expires_ns=now + 3_600_000_000_000,
    )
    workers.apply(b"bench", encode(record))
    _run(lambda: _score_server(PartitionRouter(workers), pipe))


async def _score_server(lookups: Lookups, pipe: Connection) -> None:
    settings = ScorerSettings()
    core = Core(settings, _pods(), lookups, block_size=lambda: 16)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", settings.max_message_bytes)])
    server.add_generic_rpc_handlers((ScorerFront(core, settings, Guard()).handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def _over_grpc(kind: str, address: str, calls: int) -> Iterator[dict[str, Any]]:
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(
            "/kvatlas.v1.Scorer/Score",
            request_serializer=pb.ScoreRequest.SerializeToString,
            response_deserializer=pb.ScoreResponse.FromString,
        )
        empty = pb.ScoreRequest(model=_MODEL)
        for size in _SIZES if kind == "grpc" else _SIZES[:1]:
            request = pb.ScoreRequest(model=_MODEL, tokens_packed=_tokens(size))
            count = max(calls * _SIZES[0] // size, 50)
            answer = call(request, timeout=60)
            assert answer.scores["pod-3"].matched_tokens == size
            baseline = _timed(functools.partial(call, empty), count)
            times = _timed(functools.partial(call, request), count)
            yield _figure(f"{kind}-{size}", times, statistics.median(baseline))


async def _in_process(args: argparse.Namespace) -> dict[str, Any]:
    core = Core(ScorerSettings(), _pods(), _local(args.blocks), block_size=lambda: 16)
    request = pb.ScoreRequest(model=_MODEL, tokens_packed=_tokens(_SIZES[0]))
    times = []
    for _ in range(args.calls):
        began = time.perf_counter()
        await core.score(request)
        times.append((time.perf_counter() - began) * 1e3)
    return _figure(f"inprocess-{_SIZES[0]}", times, None)


def _timed(call: Callable[[], Any], count: int) -> list[float]:
    for _ in range(20):
        call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def _figure(case: str, times: Sequence[float], baseline: float | None) -> dict[str, Any]:
    ordered = sorted(times)
    p50 = statistics.median(ordered)
    figure: dict[str, Any] = {
        "bench": "score",
        "case": case,
        "value": round(p50, 3),
        "unit": "ms",
        "p50": round(p50, 3),
        "p99": round(ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)], 3),
    }
    if baseline is not None:
        figure |= {"baseline": round(baseline, 3), "ratio": round(p50 / baseline, 2)}
    return figure
