"""Mooncake's masters as a source: what their pools hold goes on ``kv-events`` as a pod for each, without tokens.

A master publishes like an engine and has no replay, no snapshot and no tokens. What its objects are is learnt from the
events of the pods that share the pool, which are followed on ``kv-events`` from now on. So a bridge that starts knows
nothing of what is in a pool, and says so by a new epoch.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.engines.subscriber import Receive, Subscriber
from kvatlas.bridge.engines.wires import Wires
from kvatlas.bridge.errors import KvatlasError, SettingsError, WireError
from kvatlas.bridge.ingest.recovered import event_ns
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.ingest.strip import KNOWN_BLOCKS, KnownBlocks, Stripper
from kvatlas.bridge.kafka.follower import RecordFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters.mooncake import decode_object_events
from kvatlas.bridge.model.numbers import whole
from kvatlas.bridge.model.object_pool import ObjectNames, ObjectPool
from kvatlas.bridge.model.records import KeyedBatch, KeyedStored, decode
from kvatlas.bridge.relay.cache_metrics import PoolCollector, PoolFigures
from kvatlas.bridge.relay.telling import HolderTeller
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background

_TURN_SECONDS: Final = 0.2
#: Blocks remembered per pool, held and named.
_BLOCKS: Final = 1_000_000
_PARTS_MAX: Final = 1_024
_PODS_MAX: Final = 10_000


class MasterSpec(msgspec.Struct, frozen=True):
    """One listed master: where it publishes, the pods that load from its pool, and how objects are named."""

    address: str
    pods: tuple[str, ...]
    names: ObjectNames

    @property
    def pod(self) -> str:
        """The pod id of its pool."""
        return f"mooncake:{self.address.partition('://')[2]}"


def parse_master(text: str) -> MasterSpec:
    """Read ``tcp://HOST:PORT,pod=POD[,pod=POD][,key=REGEX][,hash=first|last][,parts=N]``.

    Raises:
        SettingsError: it is none.
    """
    where = f"mooncake_masters: {text!r}"
    address, *options = (part.strip() for part in text.split(","))
    pods, told = [], dict[str, str]()
    for option in options:
        name, _, value = option.partition("=")
        if name == "pod" and value:
            pods.append(value)
        elif name in ("key", "hash", "parts") and value:
            told[name] = value
        else:
            raise SettingsError(f"{where}: {option!r} is none of pod=NAME, key=REGEX, hash=first|last, parts=N")
    parse_engine(address)
    if not pods:
        raise SettingsError(f"{where}: expected the pods that load from it, pod=NAME")
    end, parts = told.get("hash", "first"), whole(told.get("parts", "1"), _PARTS_MAX)
    if end not in ("first", "last"):
        raise SettingsError(f"{where}: hash={end!r}; expected first (SGLang) or last (vLLM)")
    if not parts:
        raise SettingsError(
            f"{where}: parts={told['parts']!r}; expected the objects that make one block, 1 to {_PARTS_MAX}"
        )
    try:
        pattern = re.compile(told["key"]) if "key" in told else None
    except re.error as error:
        raise SettingsError(f"{where}: key={told['key']!r} is no regular expression: {error}") from error
    if pattern is not None and not pattern.groups:
        raise SettingsError(f"{where}: key={told['key']!r} has no group for the hash, as in ^([0-9a-f]+)_")
    return MasterSpec(address, tuple(pods), ObjectNames(pattern, "last" if end == "last" else "first", parts))


def parse_masters(texts: Iterable[str]) -> list[MasterSpec]:
    """Read all listed masters.

    Raises:
        SettingsError: one of them is none, or listed twice.
    """
    found: dict[str, MasterSpec] = {}
    for master in map(parse_master, texts):
        if master.address in found:
            raise SettingsError(f"mooncake_masters: {master.address!r} is listed twice")
        found[master.address] = master
    return list(found.values())


class _Master:
    """One master's stream and its pool."""

    def __init__(self, spec: MasterSpec, canonical_tokens: int, limit: int) -> None:
        self.spec = spec
        self.pool = ObjectPool(spec.names, canonical_tokens, limit)
        self.sequence = self.heard_from = self.first_lost = self.last_lost = -1
        self.lost = 0
        self.clock_ns = 0

    def follows(self, sequence: int) -> bool:
        """Take note of a message; False for one that begins a new stream."""
        expected, self.sequence = self.sequence + 1, sequence
        if self.heard_from < 0 or sequence < expected:
            began = self.heard_from < 0
            self.heard_from = sequence
            return began
        if sequence > expected:
            self.first_lost, self.last_lost = expected, sequence - 1
            self.lost += sequence - expected
            self.heard_from = sequence
            self.pool.holder.doubt()
        return True

    def figures(self) -> PoolFigures:
        """Return what metrics tell of it."""
        holder = self.pool.holder
        return PoolFigures(len(holder), self.lost, self.pool.nameless, holder.over)

    def facts(self) -> dict[str, Any]:
        """Return what its pool's record says."""
        lost = {"first_lost": self.first_lost, "last_lost": self.last_lost, "lost": self.lost}
        return lost | {"store": self.spec.address, "heard_from": self.heard_from, "last_event_ns": self.clock_ns}


class PoolSource:
    """Follows Mooncake's masters and tells the index.

    Attributes:
        masters: every listed one.
        rejected: messages that could not be read.
        lost: tells nothing more of the pods of some partitions.
    """

    def __init__(self, shared: Shared, wires: Wires, kafka: KafkaSettings, background: Background) -> None:
        """Describe it; nothing is opened yet.

        Raises:
            SettingsError: a listed master is none.
        """
        settings = shared.settings
        self.rejected = 0
        specs = parse_masters(settings.mooncake_masters)
        self.masters = [_Master(each, settings.block_size_tokens, _BLOCKS) for each in specs]
        self._shared = shared
        self._background = background
        self._teller = HolderTeller(shared, topics.ENGINE_MOONCAKE, "Mooncake's master")
        self.lost = self._teller.lost
        self._strippers: dict[tuple[str, str, str], Stripper] = {}
        self._wires = wires
        self._subscribers: list[Subscriber] = []
        self._follower = RecordFollower(
            kafka, topics.EVENTS, self._announced, client_id="kvatlas-bridge-mooncake", from_end=True
        )

    def metrics(self) -> PoolCollector:
        """Return the collector of its metrics."""
        return PoolCollector([(each.spec.pod, each.figures) for each in self.masters], lambda: self.rejected)

    def start(self) -> None:
        """Begin to read and to tell; either task's end ends the bridge.

        Raises:
            EngineError: an address cannot be used.
        """
        for master in self.masters:
            subscriber = Subscriber(self._wires.context, master.spec.address, self._receiver(master))
            self._subscribers.append(subscriber)
        self._follower.start()
        self._background.watch(self._follower.task)
        self._background.start(self._run())

    async def stop(self) -> None:
        """Stop reading."""
        for subscriber in self._subscribers:
            subscriber.close()
        self._background.release(self._follower.task)
        await self._follower.stop()

    def _receiver(self, master: _Master) -> Receive:
        def receive(frames: list[bytes]) -> None:
            try:
                if len(frames) != 3 or len(frames[1]) != 8:
                    raise WireError(f"{len(frames)} frames; expected topic, sequence and payload")
                batch = decode_object_events(frames[2])
            except WireError as error:
                self.rejected += 1
                self._shared.dead_letter(master.spec.pod, frames, f"not usable: {error}", master.spec.address)
                return
            if not master.follows(int.from_bytes(frames[1], "big")):
                master.pool.clear()
                self._teller.forget("its master began anew", master.spec.pod)
            master.clock_ns = event_ns(batch.seconds)
            for event in batch.events:
                master.pool.apply(event)

        return receive

    def _announced(self, record: Any) -> None:
        """Learn what blocks are called from a message of a pod that shares a pool."""
        pod = (record.key or b"").decode(errors="replace")
        mine = [each for each in self.masters if pod in each.spec.pods or pod.partition("@dp")[0] in each.spec.pods]
        if not mine or not record.value:
            return
        for event in self._stored(pod, dict(record.headers), record.value):
            for master in mine:
                master.pool.learn(event)

    def _stored(self, pod: str, headers: dict[str, bytes], value: bytes) -> Iterator[KeyedStored]:
        content = headers.get(topics.H_CONTENT_TYPE, b"").decode()
        try:
            if content == topics.CONTENT_KEYS:
                batch = decode(KeyedBatch, value)
            elif content == topics.CONTENT_ENGINE:
                names = (headers.get(name, b"").decode() for name in (topics.H_ENGINE, topics.H_MODEL))
                batch = self._stripper(pod, *names).strip(value).batch
            else:
                return
        except (KvatlasError, UnicodeDecodeError):
            return  # the workers say so
        yield from (event for event in batch.events if isinstance(event, KeyedStored))

    def _stripper(self, pod: str, engine: str, model: str) -> Stripper:
        found = self._strippers.get((pod, engine, model))
        if found is None:
            if len(self._strippers) >= _PODS_MAX:
                self._strippers.clear()
            settings = self._shared.settings
            known = KnownBlocks(KNOWN_BLOCKS)
            found = Stripper(engine, model, settings.block_size_tokens, settings.limits(), known)
            self._strippers[pod, engine, model] = found
        return found

    async def _run(self) -> None:
        await self._follower.caught_up.wait()  # who sees a pool told knows that names are learnt from then on
        while True:
            for each in self.masters:
                spec = each.spec
                await self._teller.tell(spec.pod, each.pool.holder, spec.pods, spec.address, each.facts())
            await asyncio.sleep(_TURN_SECONDS)
