"""LMCache's event topic as a source: what its servers hold goes on ``kv-events`` as pods of their own, without tokens.

Its topic is read from the start by every bridge, since nothing else tells what a server holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import SettingsError, WireError
from kvatlas.bridge.ingest.recovered import event_ns
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters.lmcache import decode_cache_events
from kvatlas.bridge.model.chunk_cache import CacheFleet
from kvatlas.bridge.relay.cache_metrics import CacheCollector
from kvatlas.bridge.relay.telling import HolderTeller
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background

_TURN_SECONDS: Final = 0.2
#: Chunks remembered per LMCache server, and tokens of as many in all: 16 million tokens of 256 a chunk.
_CHUNKS: Final = 65_536


class CacheServer(msgspec.Struct, frozen=True):
    """One listed server: the pods that load from it, and the model of its chunks where events name it otherwise."""

    instance: str
    pods: tuple[str, ...]
    model: str = ""


def parse_cache_server(text: str) -> CacheServer:
    """Read ``INSTANCE,pod=POD[,pod=POD][,model=NAME]``.

    Raises:
        SettingsError: it is none.
    """
    instance, *options = (part.strip() for part in text.split(","))
    pods, model = [], ""
    for option in options:
        name, _, value = option.partition("=")
        if name == "pod" and value:
            pods.append(value)
        elif name == "model" and value:
            model = value
        else:
            raise SettingsError(f"lmcache_servers: {text!r}: {option!r} is neither pod=NAME nor model=NAME")
    if not instance or "=" in instance or not pods:
        raise SettingsError(f"lmcache_servers: {text!r}; expected INSTANCE,pod=POD[,pod=POD][,model=NAME]")
    return CacheServer(instance, tuple(pods), model)


def parse_cache_servers(texts: Iterable[str]) -> dict[str, CacheServer]:
    """Read all listed servers, by instance.

    Raises:
        SettingsError: one of them is none, or listed twice.
    """
    found: dict[str, CacheServer] = {}
    for server in map(parse_cache_server, texts):
        if server.instance in found:
            raise SettingsError(f"lmcache_servers: {server.instance!r} is listed twice")
        found[server.instance] = server
    return found


class CacheSource:
    """Follows LMCache's topic and tells the index.

    Attributes:
        state: what the topic says.
        rejected: records that could not be read.
        lost: tells nothing more of the pods of some partitions.
    """

    def __init__(self, shared: Shared, kafka: KafkaSettings, background: Background) -> None:
        """Describe it; nothing is read yet.

        Raises:
            SettingsError: a listed server is none.
        """
        settings = shared.settings
        self.rejected = 0
        self._servers = parse_cache_servers(settings.lmcache_servers)
        self.state = self._empty(settings.block_size_tokens, _CHUNKS)
        self._shared = shared
        self._background = background
        self._topic = settings.lmcache_topic
        self._teller = HolderTeller(shared, topics.ENGINE_LMCACHE, f"topic {self._topic}")
        self.lost = self._teller.lost
        self._follower = TopicFollower(
            msgspec.structs.replace(kafka, topic_prefix=""),
            self._topic,
            self._apply,
            client_id="kvatlas-bridge-lmcache",
            lost=self._lost,
        )

    def metrics(self) -> CacheCollector:
        """Return the collector of its metrics."""
        return CacheCollector(lambda: self.state, lambda: self.rejected)

    def start(self) -> None:
        """Begin to read and to tell; either task's end ends the bridge."""
        self._follower.start()
        self._background.watch(self._follower.task)
        self._background.start(self._run())

    async def stop(self) -> None:
        """Stop reading."""
        self._background.release(self._follower.task)
        await self._follower.stop()

    def pod_of(self, holder: str) -> str:
        """Return the pod id of a holder."""
        pool = holder.startswith("\n")
        return f"lmcache-pool:{holder[1:]}" if pool else f"lmcache:{holder}"

    def _empty(self, canonical_tokens: int, limit: int) -> CacheFleet:
        return CacheFleet({name: each.model for name, each in self._servers.items()}, canonical_tokens, limit)

    async def _lost(self) -> None:
        """Begin anew: records that were to come next are gone, so what is known of the servers is not true any more."""
        settings = self._shared.settings
        self.state = self._empty(settings.block_size_tokens, _CHUNKS)
        self._teller.forget("records of its topic are gone")

    def _apply(self, key: bytes | None, value: bytes | None) -> None:
        if value is None:
            return
        try:
            for batch in decode_cache_events(value):
                self.state.apply(batch)
        except WireError as error:
            self.rejected += 1
            pod = f"lmcache:{(key or b'').decode(errors='replace')[:256]}"
            self._shared.dead_letter(pod, [b"", b"", value], f"not usable: {error}", f"topic {self._topic}")

    async def _run(self) -> None:
        while True:
            await self._follower.caught_up.wait()
            for name, holder in list(self.state.holders.items()):
                facts = self._facts(name)
                await self._teller.tell(self.pod_of(name), holder, self._served(name), f"topic:{self._topic}", facts)
            await asyncio.sleep(_TURN_SECONDS)

    def _served(self, name: str) -> list[str]:
        if not name.startswith("\n"):
            return list(self._servers[name].pods)
        mounts = [each for each in self._servers.values() if self._mounts(each.instance, name[1:])]
        return sorted({pod for each in mounts for pod in each.pods})

    def _mounts(self, instance: str, backend: str) -> bool:
        server = self.state.servers.get(instance)
        return server is not None and backend in server.pools

    def _facts(self, name: str) -> dict[str, Any]:
        if (server := self.state.servers.get(name)) is None:
            return {"store": name[1:] if name.startswith("\n") else ""}
        lost = {"first_lost": server.first_lost, "last_lost": server.last_lost, "lost": server.lost}
        return lost | {"store": "", "heard_from": server.heard_from, "last_event_ns": event_ns(server.ts)}
