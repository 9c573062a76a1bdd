"""LMCache's event topic as a source: what its servers hold goes on ``kv-events`` as pods of their own, without tokens.

Its topic is read from the start by every bridge, since nothing else tells what a server holds. A bridge tells of the
servers whose partition it owns: at first all that is held, in a new epoch, then every change. So a restart and a
takeover are the same, and no position is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError, WireError
from kvatlas.bridge.ingest.recovered import Recovered, apply_control, event_ns
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.adapters.lmcache import decode_cache_events
from kvatlas.bridge.model.chunk_cache import CacheFleet, ChunkHolder
from kvatlas.bridge.model.records import Control, KeyedBatch, PodRecord
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.relay.lmcache_metrics import CacheCollector
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background

_MESSAGE_BYTES: Final = 256 * 1024
_TURN_SECONDS: Final = 0.2
#: Chunks remembered per LMCache server, and tokens of as many in all: 16 million tokens of 256 a chunk.
_CHUNKS: Final = 65_536

log = logging.getLogger(__name__)


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


class _Told:
    """The stream of one holder on ``kv-events``, as far as this bridge writes it."""

    def __init__(self, record: PodRecord) -> None:
        self.record = record
        self.sequence = -1

    @property
    def incarnation(self) -> int:
        return epochs.incarnation_of(self.record.epoch)


class CacheSource:
    """Follows LMCache's topic and tells the index.

    Attributes:
        state: what the topic says.
        rejected: records that could not be read.
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
        self._told: dict[str, _Told] = {}
        self._topic = settings.lmcache_topic
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

    def lost(self, partitions: Sequence[int]) -> None:
        """Tell nothing more of the pods of some partitions; they are told anew once they are ours again."""
        for pod in list(self._told):
            if self._shared.partition(pod) in partitions:
                del self._told[pod]

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
        for pod, told in self._told.items():
            self._leave(pod, told)
        self._told.clear()

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

    # --- telling ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._follower.caught_up.wait()
            for name, holder in list(self.state.holders.items()):
                await self._tell(name, holder)
            await asyncio.sleep(_TURN_SECONDS)

    async def _tell(self, name: str, holder: ChunkHolder) -> None:
        """Tell what changed of one holder, where this bridge owns its pod."""
        shared, pod = self._shared, self.pod_of(name)
        told = self._told.get(pod)
        if not shared.owned(pod):
            return
        if told is None:
            told = self._told[pod] = self._take_over(pod)
            holder.restate()
        serves = self._served(name)
        if not holder.changed and list(told.record.serves) == serves:
            return
        if holder.gap:
            behind = holder.split()
            done = await self._send(told, holder)
            if done:
                incarnation = shared.next_incarnation(told.incarnation)
                self._control(told, Control(type="gap", incarnation=incarnation, reason="LMCache dropped events"))
            holder.join(behind, told=done)
            if not done:
                return
        if not await self._send(told, holder):
            return
        self._describe(name, told, serves)
        shared.put_record(told.record)

    def _take_over(self, pod: str) -> _Told:
        shared = self._shared
        known = shared.recovered.pop(pod, None)
        record = known.record if known is not None else PodRecord(pod=pod, writer=pod_ids.WRITER_BRIDGE)
        kind = "restart" if record.epoch else "start"
        told = _Told(msgspec.structs.replace(record, engine=topics.ENGINE_LMCACHE, endpoint=f"topic:{self._topic}"))
        incarnation = shared.next_incarnation(epochs.incarnation_of(record.epoch))
        self._control(told, Control(type=kind, incarnation=incarnation, reason="told anew from LMCache's topic"))
        log.info("%s: told anew from topic %s", pod, self._topic)
        return told

    def _leave(self, pod: str, told: _Told) -> None:
        log.warning("%s: records of topic %s are gone; told anew", pod, self._topic)
        self._shared.recovered[pod] = Recovered(told.record)

    def _served(self, name: str) -> list[str]:
        if not name.startswith("\n"):
            return list(self._servers[name].pods)
        mounts = [each for each in self._servers.values() if self._mounts(each.instance, name[1:])]
        return sorted({pod for each in mounts for pod in each.pods})

    def _mounts(self, instance: str, backend: str) -> bool:
        server = self.state.servers.get(instance)
        return server is not None and backend in server.pools

    def _describe(self, name: str, told: _Told, serves: Sequence[str]) -> None:
        server = self.state.servers.get(name)
        changes = {"serves": list(serves), "state": records.LIVE, "receive_ns": self._shared.now_ns()}
        changes["last_sequence"] = told.sequence
        changes["store"] = name[1:] if name.startswith("\n") else ""
        if server is not None:
            changes |= {"heard_from": server.heard_from, "last_event_ns": event_ns(server.ts), "lost": server.lost}
            changes |= {"first_lost": server.first_lost, "last_lost": server.last_lost}
        told.record = msgspec.structs.replace(told.record, **changes)

    async def _send(self, told: _Told, holder: ChunkHolder) -> bool:
        """Tell what changed; False when there is no room for all of it, or the pod was given away meanwhile."""
        changes = holder.changes(_MESSAGE_BYTES)
        key = told.record.pod.encode()
        while self._shared.sink.room(key) and self._told.get(told.record.pod) is told:
            events = next(changes, None)
            if events is None:
                return True
            self._message(told, KeyedBatch(timestamp=self._shared.now_ns() / 1e9, events=list(events)))
            await asyncio.sleep(0)  # a large cache must not hold up the engines
        return False

    def _message(self, told: _Told, batch: KeyedBatch) -> None:
        shared = self._shared
        told.sequence += 1
        headers = [
            (topics.H_CONTENT_TYPE, topics.CONTENT_KEYS.encode()),
            (topics.H_SEQUENCE, b"%d" % told.sequence),
            (topics.H_RECEIVE_NS, b"%d" % shared.now_ns()),
            (topics.H_INCARNATION, b"%d" % told.incarnation),
            *_FIXED,
        ]
        pod = told.record.pod
        item = QueuedRecord(pod.encode(), records.encode(batch), headers)
        shared.sink.send(topics.EVENTS, shared.partition(pod), item)

    def _control(self, told: _Told, control: Control) -> None:
        told.record = apply_control(told.record, control)
        self._shared.put_control(told.record.pod, control, _FIXED, None)


_FIXED: Final[topics.Headers] = [
    (topics.H_ENGINE, topics.ENGINE_LMCACHE.encode()),
    (topics.H_ANNOUNCEMENTS, b"presence"),
]
