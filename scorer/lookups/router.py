"""Lookups of a prompt's block keys, wherever their partitions are.

Two transports behind :class:`~kvatlas.scorer.scoring.lookup.Lookups`: :class:`PartitionRouter` asks the workers that
own the partitions, in parallel, over gRPC; :class:`~kvatlas.scorer.lookups.local.TableLookups` reads the tables of
this very process.

What the router does (:mod:`kvatlas.scorer.lookups.attempts`):

1. Split the keys by owner; ask all owners at once.
2. An owner that does not answer within ``hedge_ms``: ask a standby as well, the first answer counts.
3. Partitions that came back without an answer (moved, restoring, refused, worker gone) are asked again at once,
   whatever the others wait for: of the owner that the answer named, else of the next candidate, standbys last. Until
   the deadline, at most three times.
4. What is left has no answer: None. The caller flags it; it is never mistaken for "nobody holds it".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.scorer.lookups.attempts import Asking, Outcome
from kvatlas.scorer.scoring.lookup import ACTIVE, RESTORING, STANDBY, UNANSWERED, Answers, Seen
from kvatlas.streams.index.columns import NOT_ANSWERED, read_index
from kvatlas.streams.index.holders import readable
from kvatlas.streams.v1 import block_index_pb2 as pb

log = logging.getLogger(__name__)

_METHOD: Final = "/kvatlas.v1.BlockIndex/Lookup"
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", 256 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)

_ROLES: Final = {
    pb.PartitionState.ACTIVE: ACTIVE,
    pb.PartitionState.STANDBY: STANDBY,
    pb.PartitionState.RESTORING: RESTORING,
    pb.PartitionState.ELSEWHERE: UNANSWERED,
}

#: What is said of a partition that several workers spoke of: the one that its values are from.
_RANK: Final = {ACTIVE: 3, STANDBY: 2, RESTORING: 1, UNANSWERED: 0}


def partitions_of(packed: bytes, count: int) -> npt.NDArray[np.uint32]:
    """Return the partition of every packed 16-byte key, as :func:`kvatlas.bridge.model.block_key.partition_of` does."""
    words: npt.NDArray[np.uint32] = np.frombuffer(packed, dtype=">u4")[:: KEY_BYTES // 4] % np.uint32(count)
    return words


class PartitionRouter:
    """Lookups at the workers that own the partitions; see the module's text."""

    first_blocks = 0

    def __init__(
        self,
        workers: WorkerDirectory,
        *,
        hedge_seconds: float = 0.05,
        credentials: grpc.ChannelCredentials | None = None,
        on_event: Callable[[str], None] = lambda _event: None,
    ) -> None:
        """Take the table of workers.

        Args:
            workers: who answers for what.
            hedge_seconds: ask a standby too after so long; 0 never.
            credentials: for TLS to the workers; None connects in the clear.
            on_event: told of ``hedged``, ``redirected``, ``failed`` and ``unanswered``, for metrics.
        """
        self._workers = workers
        self._hedge_seconds = hedge_seconds
        self._credentials = credentials
        self._on_event = on_event
        self._calls: dict[str, tuple[grpc.aio.Channel, Any]] = {}

    @property
    def stale(self) -> bool:
        """Whether no worker has said of late that it keeps the index up to date."""
        return self._workers.stale

    def unready(self) -> str | None:
        """Return why no lookup can be answered now, None when it can."""
        return None if self._workers.layout is not None else "no worker has announced itself on kv-workers"

    async def close(self) -> None:
        """Close all connections."""
        calls, self._calls = self._calls, {}
        for channel, _ in calls.values():
            await channel.close()

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Look keys up; see the module's text."""
        layout = self._workers.layout
        values: list[bytes | None] = [None] * len(keys)
        if layout is None:
            return Answers(values, {})
        packed = b"".join(keys)
        numbers = partitions_of(packed, layout.partition_count)
        touched = np.bincount(numbers).nonzero()[0].tolist()
        request = _Request(packed, numbers, layout.partition_count, values, deadline, touched=len(touched))
        pending = await Asking(
            {partition: self._candidates(partition) for partition in touched},
            lambda endpoint, partitions: self._ask(endpoint, partitions, request),
            hedge_seconds=self._hedge_seconds,
            deadline=deadline,
            on_event=self._on_event,
        ).run()
        for partition in pending:
            if partition not in request.seen or request.seen[partition].role in (ACTIVE, STANDBY):
                request.seen[partition] = Seen(UNANSWERED, "", -1, 0)
        if pending:
            self._on_event("unanswered")
        return Answers(values, request.seen)

    def _candidates(self, partition: int) -> list[str]:
        route = self._workers.route(partition)
        return [*route.owners, *route.standbys]

    async def _ask(self, endpoint: str, partitions: list[int], request: _Request) -> Outcome:
        remaining = request.deadline - time.monotonic()
        if remaining <= 0:
            return set(), {}
        message, positions = request.part(partitions)
        try:
            response = await self._call(endpoint)(message, timeout=remaining)
            return request.take(response, partitions, positions)
        except grpc.aio.AioRpcError as error:
            log.debug("worker %s: %s %s", endpoint, error.code().name, error.details())
        except asyncio.CancelledError:
            # A connection that is closed cancels its calls, and that reaches us as if we were cancelled ourselves.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log.debug("worker %s: the connection was closed", endpoint)
        except (ValueError, IndexError) as error:
            log.error("worker %s: its answer makes no sense: %s", endpoint, error)
        self._on_event("failed")
        return set(), {}

    def _call(self, endpoint: str) -> Any:
        found = self._calls.get(endpoint)
        if found is None:
            channel = (
                grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
                if self._credentials is None
                else grpc.aio.secure_channel(endpoint, self._credentials, options=_CHANNEL_OPTIONS)
            )
            call = channel.unary_unary(
                _METHOD,
                request_serializer=pb.LookupRequest.SerializeToString,
                response_deserializer=pb.LookupResponse.FromString,
            )
            found = self._calls[endpoint] = (channel, call)
        return found[1]

    async def forget_gone(self) -> None:
        """Close connections to endpoints that no worker announces any more."""
        known = self._workers.endpoints()
        for endpoint in [e for e in self._calls if e not in known]:
            channel, _ = self._calls.pop(endpoint)
            with contextlib.suppress(Exception):
                await channel.close()


class _Request:
    """One lookup under way: the keys by partition and the answers as they come in."""

    def __init__(
        self,
        packed: bytes,
        numbers: npt.NDArray[np.uint32],
        partition_count: int,
        values: list[bytes | None],
        deadline: float,
        *,
        touched: int,
    ) -> None:
        self.deadline = deadline
        self.seen: dict[int, Seen] = {}
        self._packed = packed
        self._numbers = numbers
        self._touched = touched  # partitions that the keys lie in
        self._count = partition_count
        self._values = values
        self._settled: set[int] = set()  # partitions whose owner has answered

    def part(self, partitions: list[int]) -> tuple[pb.LookupRequest, npt.NDArray[np.intp] | None]:
        """Return the request for some partitions, and the positions of its keys (None: all of them, in order)."""
        if len(partitions) in (0, self._touched):
            packed, positions = self._packed, None
        else:
            positions = np.flatnonzero(np.isin(self._numbers, np.asarray(partitions, dtype=np.uint32)))
            packed = np.frombuffer(self._packed, dtype="V16")[positions].tobytes()
        return pb.LookupRequest(keys=packed, partition_count=self._count, allow_standby=True), positions

    def take(
        self, response: pb.LookupResponse, partitions: list[int], positions: npt.NDArray[np.intp] | None
    ) -> tuple[set[int], dict[int, str]]:
        """Take an answer in; returns the partitions that it answered and the owners it named for the others."""
        index = read_index(response.index)
        expected = len(self._values) if positions is None else len(positions)
        if len(index) != expected:
            raise ValueError(f"{len(index)} keys instead of {expected}")
        where = range(expected) if positions is None else positions.tolist()
        table = [b"", *map(readable, response.values)]
        found = [None if number == NOT_ANSWERED else table[number] for number in index]
        answered, owners = self._note(response)
        missing = self._put(where, found, self._settled)
        answered -= missing
        self._settled |= {s.partition for s in response.partitions if s.role == pb.PartitionState.ACTIVE} & answered
        return answered & set(partitions), owners

    def _put(self, where: Sequence[int], found: list[bytes | None], settled: set[int]) -> set[int]:
        """Put values in their places; returns the partitions of keys that have none.

        What an owner has said stays (``settled``): a standby that is asked as well may be behind, and answer last.
        """
        values, numbers = self._values, self._numbers
        missing: set[int] = set()
        if settled or None in found:
            for position, value in zip(where, found, strict=True):
                number = int(numbers[position])
                if value is None:
                    missing.add(number)
                elif number not in settled:
                    values[position] = value
        elif len(found) == len(values):
            values[:] = found
        else:
            for position, value in zip(where, found, strict=True):
                values[position] = value
        return missing

    def _note(self, response: pb.LookupResponse) -> tuple[set[int], dict[int, str]]:
        """Note what an answer says of its partitions; returns those answered and the owners of others."""
        answered: set[int] = set()
        owners: dict[int, str] = {}
        for state in response.partitions:
            role = _ROLES.get(state.role, UNANSWERED)
            if role in (ACTIVE, STANDBY):
                answered.add(state.partition)
            elif state.owner:
                owners[state.partition] = state.owner
            before = self.seen.get(state.partition)
            if before is None or _RANK[role] >= _RANK[before.role]:
                self.seen[state.partition] = Seen(role, response.worker, state.applied_offset, state.applied_receive_ns)
        return answered, owners
