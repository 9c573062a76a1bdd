"""A scorer over real gRPC servers and workers whose tables are dicts, for the tests of the scorer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, partition_of, root_key
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import PodRecord, WorkerRecord, encode
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.methods import add_service
from kvatlas.scorer.api.bodies import Inflight
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.grpc_server import ScorerFront
from kvatlas.scorer.api.security import Guard
from kvatlas.scorer.api.tracing import Tracing
from kvatlas.scorer.client import AsyncScorerClient
from kvatlas.scorer.lookups.index import Index as VersionIndex
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.router import PartitionRouter
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.decisions import Decisions
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.v1 import block_index_pb2 as index_pb

PARTITIONS = 4
TOKENS = list(range(100, 100 + 160))
KEYS = block_keys(root_key("m"), pack_tokens(TOKENS), 16)


class Index:
    """A worker's lookup service over a dict, for some partitions."""

    def __init__(
        self, name: str, table: dict[bytes, bytes], partitions: set[int], role: int = 1, owner: str = ""
    ) -> None:
        self.name, self.table, self.partitions, self.role, self.owner = name, table, partitions, role, owner
        self.asked = 0

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        self.asked += 1
        keys = [request.keys[at : at + 16] for at in range(0, len(request.keys), 16)]
        away = [n for n, key in enumerate(keys) if partition_of(key, PARTITIONS) not in self.partitions]
        values, index = answer_columns([self.table.get(key) for key in keys], away)
        states = [
            index_pb.PartitionState(
                partition=p,
                role=self.role if p in self.partitions else index_pb.PartitionState.ELSEWHERE,  # type: ignore[arg-type]
                applied_offset=7,
                owner="" if p in self.partitions else self.owner,
            )
            for p in sorted({partition_of(key, PARTITIONS) for key in keys})
        ]
        return index_pb.LookupResponse(values=values, index=index, partitions=states, worker=self.name)


class Rig:
    """A scorer over dict-backed workers, without Kafka: records are applied by hand."""

    def __init__(self, *, pool: TokenizerPool | None = None, inflight: Inflight | None = None, **settings: Any) -> None:
        self.settings = ScorerSettings(**{"hedge_ms": 0.0, "deadline_ms": 60_000.0, **settings})
        self.table: dict[bytes, bytes] = {}
        self.workers = WorkerDirectory(time.time_ns)
        self.pods = PodTable()
        self.router = PartitionRouter(self.workers, hedge_seconds=self.settings.hedge_ms / 1e3)
        self.sent: list[Any] = []
        self.core = Core(
            self.settings,
            VersionIndex(
                self.pods,
                self.router,
                lambda: self.workers.layout.block_size_tokens if self.workers.layout else None,
                lambda: PARTITIONS,
            ),
            pool=pool,
            decisions=Decisions(self.settings, self.sent.append),
            observe=lambda stage, seconds: self.tracing.stage(stage, seconds) if self.tracing else None,
        )
        self.guard = Guard.from_settings(self.settings)
        self.calls = Calls(
            self.core,
            self.settings,
            self.guard,
            lambda model: self.tracing.named(model) if self.tracing else None,
        )
        self.inflight = inflight or Inflight()
        self.tracing: Tracing | None = None
        self.server: grpc.aio.Server | None = None
        self.stack = contextlib.AsyncExitStack()
        self.stack.callback(self.core.intake.close)

    async def worker(self, index: Index, *, standby: bool = False, **fields: Any) -> grpc.aio.Server:
        server = grpc.aio.server()
        add_service(server, index_pb, index)
        endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.stack.push_async_callback(server.stop, 0)
        self.announce(index.name, endpoint, sorted(index.partitions), standby=standby, **fields)
        return server

    def announce(
        self, name: str, endpoint: str, partitions: list[int], *, standby: bool = False, **fields: Any
    ) -> None:
        now = time.time_ns()
        record = WorkerRecord(
            worker=name,
            endpoint=endpoint,
            partitions=[] if standby else partitions,
            standby=partitions if standby else [],
            partition_count=PARTITIONS,
            updated_ns=now,
            expires_ns=now + 60_000_000_000,
            **fields,
        )
        self.workers.apply(name.encode(), encode(record))

    def pod(self, name: str, blocks: int, **fields: Any) -> None:
        record = PodRecord(pod=name, writer="streams", model="m", block_size_tokens=16, last_sequence=3, **fields)
        self.pods.apply(f"streams|{name}".encode(), encode(record))
        self.hold(name, KEYS[:blocks])

    def hold(self, name: str, keys: Sequence[bytes]) -> None:
        """Let a pod hold blocks on its GPU."""
        for key in keys:
            self.table[key] = self.table.get(key, b"") + pack_holder(pod_ref(name), 0, 1, 0, 0, 0)

    async def serve(self, credentials: grpc.ServerCredentials | None = None) -> str:
        """Start a server with the scorer's RPCs; returns its address."""
        server = grpc.aio.server()
        ScorerFront(self.calls, self.inflight, self.tracing).add_to(server)
        port = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("127.0.0.1:0", credentials)
        )
        await server.start()
        self.server = server
        self.stack.push_async_callback(server.stop, 0)
        return f"127.0.0.1:{port}"

    async def client(self, **options: Any) -> AsyncScorerClient:
        address = await self.serve()
        return await self.stack.enter_async_context(AsyncScorerClient(address, **options))
