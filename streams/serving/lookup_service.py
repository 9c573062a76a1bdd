"""The lookup service of a worker: ``BlockIndex.Lookup`` over gRPC, answered from the table.

Lookups run on the same event loop as ingestion, between two slices of a flush: a read from the cache costs 0.2 us a
key and a multi-get 3 us, so a lookup of 512 keys holds the loop for 0.1 to 2 ms. A thread would not be faster: both
need the interpreter's lock, and a partition could be closed under its feet. Larger ones are read slice by slice, one
of them at a time, so that they hold up nobody else for longer than that.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.chain import split_keys
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.bridge.runtime.methods import add_service
from kvatlas.bridge.runtime.rpc import Gate, pushback, rpc_server, serving
from kvatlas.streams import metrics
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.serving.answers import SLICE_KEYS, read_slices
from kvatlas.streams.state.partition import PartitionState, Role
from kvatlas.streams.v1 import block_index_pb2 as pb

SERVICE: Final = "kvatlas.v1.BlockIndex"
#: Kafka is asked for a partition's lag so seldom: it takes longer than the lookup of many keys.
_LAG_SECONDS: Final = 0.01
#: Far more than wait their time out; a bound of memory.
_MOST_LOOKUPS: Final = 4_096
#: Lookups of more keys than a slice that wait for one another.
_MOST_LARGE: Final = 64
_LARGE_RETRY_SECONDS: Final = 0.1
_ROLES: Final = {
    Role.ACTIVE: pb.PartitionState.ACTIVE,
    Role.STANDBY: pb.PartitionState.STANDBY,
    Role.RESTORING: pb.PartitionState.RESTORING,
}

StateOf = Callable[[int], PartitionState | None]


class LookupService:
    """Answers lookups.

    Args:
        worker: this worker's id.
        partition_count: partitions of ``kv-blocks``.
        max_keys: largest request.
        state_of: partition -> local state of ``block_index``, None when it is not here.
        lag_of: partition -> records behind the end of ``kv-blocks``, -1 when unknown.
        others: who owns what is not here.
        certain: whether the group surely counts this worker in; while it may not, what is active here is answered
            as a standby's, since another worker may have newer.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        worker: str,
        *,
        partition_count: int,
        max_keys: int,
        state_of: StateOf,
        lag_of: Callable[[int], int],
        others: WorkerDirectory,
        certain: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._certain = certain
        self._worker = worker
        self._partition_count = partition_count
        self._max_keys = max_keys
        self._state_of = state_of
        self._lag_of = lag_of
        self._lags: dict[int, tuple[float, int]] = {}  # partition -> until when this is told, records
        self._others = others
        self._admission = Admission(_MOST_LOOKUPS, "lookups are worked on", clock=clock)
        self._large = 0
        self._large_turn = asyncio.Lock()

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:  # noqa: N802 # gRPC's name
        """Return the holders of a batch of keys.

        Aborts with INVALID_ARGUMENT (keys of a wrong length), RESOURCE_EXHAUSTED (too many keys, or more lookups than
        time) or FAILED_PRECONDITION (the caller counts other partitions).
        """
        remaining = context.time_remaining()
        until = math.inf if remaining is None else self._clock() + remaining
        try:
            async with self._admission.turn(until):
                return await self._lookup(request, context)
        except OverloadedError as error:
            metrics.LOOKUPS.labels("overloaded").inc()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), pushback(error))
            raise

    def gate(self) -> Gate:
        """Return where lookups wait for their turn."""
        return Gate(self._admission, lambda _method: metrics.LOOKUPS.labels("overloaded").inc())

    async def _lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:
        began = time.perf_counter()
        packed = request.keys
        if len(packed) % KEY_BYTES:
            metrics.LOOKUPS.labels("invalid").inc()
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"keys of {len(packed)} bytes are no multiple of {KEY_BYTES}"
            )
        count = len(packed) // KEY_BYTES
        if count > self._max_keys:
            metrics.LOOKUPS.labels("too_large").inc()
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{count} keys in one lookup; at most {self._max_keys}, split it"
            )
        if request.partition_count not in (0, self._partition_count):
            metrics.LOOKUPS.labels("partition_count").inc()
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the caller counts {request.partition_count} partitions of kv-blocks, this worker "
                f"{self._partition_count}; read kv-workers again",
            )
        response = await self._in_turn(packed, count, request.allow_standby)
        metrics.LOOKUPS.labels("ok").inc()
        metrics.LOOKUP_KEYS.inc(count)
        metrics.LOOKUP_SECONDS.observe(time.perf_counter() - began)
        return response

    async def _in_turn(self, packed: bytes, count: int, allow_standby: bool) -> pb.LookupResponse:
        if count <= SLICE_KEYS:
            return await self._answer(packed, count, allow_standby)
        if self._large >= _MOST_LARGE:
            raise OverloadedError(f"{self._large} large lookups are worked on; try again", _LARGE_RETRY_SECONDS)
        self._large += 1
        try:
            async with self._large_turn:
                return await self._answer(packed, count, allow_standby)
        finally:
            self._large -= 1

    async def _answer(self, packed: bytes, count: int, allow_standby: bool) -> pb.LookupResponse:
        """Read slice by slice: what is told of a partition is as of its first, so no newer than what was read of it.

        From a partition that comes, goes or changes its role meanwhile nothing more is read.
        """
        keys = split_keys(packed)
        heads = np.frombuffer(packed, dtype=">u4")[:: KEY_BYTES // 4] if count else np.empty(0, dtype=np.uint32)
        numbers: list[int] = (heads % np.uint32(self._partition_count)).tolist()
        told: dict[int, tuple[Role, pb.PartitionState]] = {}
        values, unanswered = await read_slices(
            keys, numbers, lambda touched: self._readable(touched, allow_standby, told)
        )
        columns, index = answer_columns(values, unanswered)
        states = [state for _, (_, state) in sorted(told.items())]
        return pb.LookupResponse(values=columns, index=index, partitions=states, worker=self._worker)

    def _readable(
        self, touched: set[int], allow_standby: bool, told: dict[int, tuple[Role, pb.PartitionState]]
    ) -> dict[int, PartitionState]:
        """Return those of a slice's partitions that may be read, and describe those that are touched first."""
        found: dict[int, PartitionState] = {}
        for partition in sorted(touched):
            state = self._state_of(partition)
            role = self._role(state)
            if partition not in told:
                told[partition] = (role, self._describe(partition, state, role))
            if state is None or told[partition][0] is not role:
                continue
            if role is Role.ACTIVE or (role is Role.STANDBY and allow_standby):
                found[partition] = state
        return found

    def _role(self, state: PartitionState | None) -> Role:
        if state is None:
            return Role.RESTORING
        return Role.STANDBY if state.role is Role.ACTIVE and not self._certain() else state.role

    def _describe(self, partition: int, state: PartitionState | None, role: Role) -> pb.PartitionState:
        if state is None:
            return pb.PartitionState(
                partition=partition,
                role=pb.PartitionState.ELSEWHERE,
                applied_offset=-1,
                owner=self._others.owner(partition, self._worker),
                lag_records=-1,
            )
        reflected = state.reflected
        return pb.PartitionState(
            partition=partition,
            role=_ROLES[role],
            owner="" if role is Role.ACTIVE else self._others.owner(partition, self._worker),
            applied_offset=reflected.source_offset,
            applied_receive_ns=reflected.receive_ns,
            lag_records=self._lag(partition) if role is Role.ACTIVE else -1,
        )

    def _lag(self, partition: int) -> int:
        until, records = self._lags.get(partition, (0.0, -1))
        if (now := self._clock()) >= until:
            records = self._lag_of(partition)
            self._lags[partition] = (now + _LAG_SECONDS, records)
        return records


class LookupServer:
    """The gRPC server: lookups and health.

    Args:
        service: answers.
        listen: host:port; port 0 takes a free one.
        max_keys: largest request, which bounds message sizes.
    """

    def __init__(self, service: LookupService, listen: str, *, max_keys: int) -> None:
        self._listen = listen
        self._server = rpc_server(max_keys * KEY_BYTES + 1024, gate=service.gate())
        self._health = health.aio.HealthServicer()
        add_service(self._server, pb, service)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self) -> int:
        """Start to serve; returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._listen}: {error}") from error
        await self._server.start()
        await self.set_ready(False)
        return int(port)

    async def set_ready(self, ready: bool) -> None:
        """Say to health checks whether lookups are answered."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, status)
        await self._health.set("", status)

    async def serving(self) -> None:
        """Wait until it serves no more; raises what its loop died of as a ``TaskEndedError``."""
        await serving(self._server, f"of lookups on {self._listen}")

    async def stop(self, grace_seconds: float = 0.2) -> None:
        """Stop: lookups in progress get ``grace_seconds``."""
        await self._server.stop(grace_seconds)
