"""Every reader of every topic takes arbitrary bytes in key, value and headers: skipped and counted, never an exception.

The values are random bytes, records of ours with bytes changed, and records of ours with numbers at the ends of what
msgpack has; and whatever a reader accepted must be good enough for what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.ingest.recovered import Recovered, fold
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.validity import Validity
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.relay.recovery import take_record
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import compare
from kvatlas.deploy.history.filters import Filter, Wanted
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.playback import _frames, _time_ms
from kvatlas.deploy.history.show import _ROWS, describe
from kvatlas.deploy.history.summary import read_message
from kvatlas.deploy.reindex.prompts import Chains
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.state import PickerState
from kvatlas.scorer.library.backends.mirror import MirrorBackend, MirrorFollower, Snapshot
from kvatlas.scorer.library.indexer import Indexer
from kvatlas.scorer.library.replica import PartitionView, Replica
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.picker.endpoints import Endpoint
from kvatlas.scorer.scoring.decisions import Decisions
from kvatlas.streams.errors import FencedError
from kvatlas.streams.index.apply import apply_blocks, live_holders, sweep_index
from kvatlas.streams.index.apply import is_entry as index_entry
from kvatlas.streams.index.blocks_record import OP_ADD, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import HOLDER_BYTES, holders, pack_holder
from kvatlas.streams.index.view import DictView
from kvatlas.streams.mirror.layout import MirrorLayout
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.resolve import engine_blocks
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.entries import is_entry as engine_entry
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver
from kvatlas.streams.resolve.sweep import sweep_engine_blocks
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta, encode_meta
from kvatlas.streams.state.claims import examine
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import OFFSET_KEY, PartitionState, Valid
from tests.streams.mirror.rig import Changelog, Member

Value = bytes | None

VALID = {7: Validity(1, 1)}
EDGES = [0, 1, -1, 16, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
EXAMPLES: list[msgspec.Struct] = [
    records.Control(type="gap", incarnation=5, first_lost=1, last_lost=3),
    records.Control(type="restart", incarnation=9),
    records.PodRecord(pod="p", writer="bridge", epoch=7 << 32, model="m", groups={0: records.GroupSpec(0, 0, 16)}),
    records.WorkerRecord(worker="w", endpoint="h:1", partitions=[0, 1], partition_count=2, offsets={0: 5}),
    records.IndexCatalog(),
    records.IndexCatalog(active="v2", versions={"v2": records.IndexVersion(block_size_tokens=32)}, updated_ns=1),
    records.DecisionRecord(request_id="r", pod="p", keys=bytes(32), expires_ns=2**62, scores={"p": (1.0, 2)}),
    records.DecisionRecord(kind="sessions", request_id="", pod="p", sessions={"a" * 16: 2**62, "": 1}),
    records.DecisionRecord(kind="served", request_id="r", pod="p", prompt_tokens=-1, cached_tokens=3),
    records.KeyedBatch(
        timestamp=1.0,
        events=[
            records.KeyedStored(
                engine_keys=[b"e"], parent=None, block_keys=bytes(16), keys_per_block=1, tier=1, group=0, kind=0,
                window_tokens=0, block_size_tokens=16, session="a" * 16,
            ),
            records.KeyedRemoved(engine_keys=[b"e"], tier=1, group=0),
            records.KeyedCleared(),
        ],
    ),
]  # fmt: skip
BLOCKS = encode_blocks([Run(7, 1 << 32, 1, 2, 1)], bytes(16), bytes([OP_ADD]), pack_holder(7, 0, 1, 0, 0, 1 << 32), 9)
ENGINE = msgspec.msgpack.encode([1.5, [["BlockStored", [1, 2], None, list(range(32)), 16]], None])
META = encode_meta(Meta(5, 6, 7, 1, 2))
STATE = engine_blocks.encode_state(engine_blocks.PodState(v=1, pod="p", incarnation=1))


def _with_edges(plain: Any, choose: Callable[[int], int]) -> Any:
    """Put other numbers in the place of some."""
    if isinstance(plain, bool) or not isinstance(plain, int | list | dict | tuple):
        return plain
    if isinstance(plain, int):
        return choose(plain)
    if isinstance(plain, dict):
        return {key: _with_edges(value, choose) for key, value in plain.items()}
    return [_with_edges(value, choose) for value in plain]


@st.composite
def edged(draw: st.DrawFn) -> bytes:
    """A record of ours with numbers at the ends."""
    plain = msgspec.msgpack.decode(records.encode(draw(st.sampled_from(EXAMPLES))), strict=False)
    choice = st.one_of(st.none(), st.none(), st.sampled_from(EDGES))
    return msgspec.msgpack.encode(_with_edges(plain, lambda old: old if (new := draw(choice)) is None else new))


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A record of ours with a few bytes changed, or cut."""
    good = [*map(records.encode, EXAMPLES), BLOCKS, ENGINE, META, STATE]
    data = bytearray(draw(st.sampled_from(good)))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = byte
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


deep = st.sampled_from([b"\x91" * 2000, b"\x81\xa1v" * 2000, b"\x92\x01" + b"\x91" * 100_000])
values = st.one_of(st.none(), st.binary(max_size=60), edged(), spoilt(), deep, st.just(BLOCKS), st.just(META))
numbers = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(EDGES).map(lambda n: b"%d" % n),
    st.sampled_from([b"9" * 5000, b"1" * 4000, b"-0", b" 7", b"1_0", b"0x1", "٣".encode(), b"1e5"]),
)
contents = st.one_of(st.sampled_from([b"engine", b"keys", b"control"]), st.binary(max_size=4))
headers = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([topics.H_SEQUENCE, topics.H_INCARNATION, topics.H_RECEIVE_NS]), numbers),
        st.tuples(st.just(topics.H_CONTENT_TYPE), contents),
        st.tuples(st.text(max_size=6), st.binary(max_size=6)),
        st.tuples(st.sampled_from([topics.H_MODEL, topics.H_ENGINE, topics.H_STORE]), st.binary(max_size=6)),
    ),
    max_size=8,
).map(tuple)
keys = st.one_of(
    st.none(),
    st.binary(max_size=20),
    st.sampled_from([b"p", b"bridge|p", b"streams|p", b"streams.v2|p", b"w", b"|index-versions", META_KEY, OFFSET_KEY]),
    st.binary(min_size=16, max_size=16),
    st.just(b"\x00pod" + bytes(8)),
    st.just(bytes(8) + b"\x00"),
    st.binary(min_size=3, max_size=3).map(lambda tail: bytes(8) + b"\x01" + bytes(2) + tail),
)
fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def a_record(key: Value, value: Value, found: tuple[tuple[str, bytes], ...] = (), topic: str = topics.EVENTS) -> Record:
    return Record(topic, 0, 7, 1_700_000_000_000, key, value, found)


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_what_is_written_can_be_read(record: msgspec.Struct) -> None:
    """Also where an engine says how much it had cached and not how long the prompt was."""
    assert records.decode(type(record), records.encode(record)) == record


@fuzzed
@given(value=values, kind=st.sampled_from(EXAMPLES))
def test_a_record_is_decoded_or_refused(value: Value, kind: msgspec.Struct) -> None:
    """Nothing but a WireError comes out, and what was decoded can be written again."""
    try:
        found = records.decode(type(kind), value or b"")
    except WireError:
        return
    records.encode(found)


@fuzzed
@given(st.lists(st.tuples(keys, values, headers), max_size=6))
def test_resolve_takes_any_event(messages: list[tuple[Value, Value, tuple[tuple[str, bytes], ...]]]) -> None:
    """Dead letters, and an index and tables that every next message and sweep can work with."""
    resolver, view, index, counts = Resolver(ResolveOptions(), 2, lambda: 7), DictView(), DictView(), Counter[str]()
    for offset, (key, value, found) in enumerate(messages):
        effects = Effects(2)
        resolver.apply(view, parse_message(key, value, found, 0, offset), effects)
        for encoded in effects.encode().values():
            for blocks in encoded:
                apply_blocks(index, decode_blocks(blocks), counts)
        for record in effects.pods.values():
            assert records.decode(records.PodRecord, records.encode(record)) == record
    assert all(engine_entry(key, value) for key, value in view.values.items())
    assert all(index_entry(key, value) for key, value in index.values.items())


@fuzzed
@given(st.lists(values, max_size=6))
def test_the_index_takes_any_block_update(found: list[Value]) -> None:
    """Refused, or applied to a table whose every value can be read and swept."""
    index = DictView()
    for value in found:
        try:
            record = decode_blocks(value or b"")
        except WireError:
            continue
        apply_blocks(index, record, Counter())
        encode_meta(Meta(1, record.receive_ns, 3))
    for key, value in index.values.items():
        assert index_entry(key, value)
        if len(key) == 16:
            list(holders(value))
            live_holders(value, VALID)
    sweep_index(list(index.values.items()), VALID)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Valid], PartitionState]]:
    """Empties and returns a partition's state."""
    folder = tmp_path_factory.mktemp("states")
    budget = RocksBudget(1 << 20, 8 << 20)
    made: dict[Valid, PartitionState] = {}

    def empty(valid: Valid) -> PartitionState:
        if valid not in made:
            made[valid] = PartitionState(0, folder / f"{len(made)}.db", budget, 1 << 16, valid=valid)
        state = made[valid]
        batch = {key: None for key, _ in state.items()}
        state.write(batch, 0, Meta())
        state.foreign.clear()
        state._dropping = False
        return state

    yield empty
    for state in made.values():
        state.close()


@settings(fuzzed, max_examples=150)
@given(entries=st.lists(st.tuples(keys, values), max_size=12), valid=st.sampled_from([index_entry, engine_entry]))
def test_a_restore_takes_any_changelog(
    states: Callable[[Valid], PartitionState], entries: list[tuple[Value, Value]], valid: Valid
) -> None:
    """Only entries are in the table, it can be swept, claimed and written, and the next start finds it."""
    state = states(valid)
    state.load(entries, 41)
    found = list(state.items())
    assert all(valid(key, value) for key, value in found)
    if valid is index_entry:
        sweep_index(found, VALID)
    else:
        sweep_engine_blocks(found, VALID)
    claim = state.meta._replace(epoch=state.meta.epoch + 1, written_ns=1)
    assert decode_meta(encode_meta(claim)) == claim
    assert state.changelog_offset in (0, 41)
    with contextlib.suppress(FencedError):
        assert None not in examine(entries, Meta(epoch=1, owner=2), "changelog")


def test_what_is_known_of_a_spoilt_entry_is_written_again(states: Callable[[Valid], PartitionState]) -> None:
    """Entries and claims that are none do not touch what is there, and their keys are the owner's to write again."""
    state = states(index_entry)
    key, good = bytes(16), pack_holder(7, 0, 1, 0, 0, 1 << 32)
    state.load([(META_KEY, META), (key, good), (META_KEY, META)], 1)
    state.load([(key, b"x"), (b"what", b"is this"), (META_KEY, b"1234"), (key, None), (META_KEY, META)], 6)
    assert (state.get(key), state.get(b"what")) == (good, None)
    assert state.foreign == {key, b"what"}
    assert state.meta == decode_meta(META)


@fuzzed
@given(
    pods=st.lists(st.tuples(keys, values), max_size=4),
    events=st.lists(st.tuples(st.one_of(st.just(b"p"), st.binary(max_size=4)), values, headers), max_size=6),
)
def test_a_bridge_starts_from_any_log(
    pods: list[tuple[Value, Value]], events: list[tuple[bytes, Value, tuple[tuple[str, bytes], ...]]]
) -> None:
    """Positions that can go on, and records that can be written."""
    known: dict[str, Recovered] = {}
    for key, value in pods:
        take_record(known, a_record(key, value))
    for offset, (pod, value, found) in enumerate(events):
        fold(known, pod, value or b"", dict(found), (0, offset), known_blocks=8)
    for one in known.values():
        position = one.position()
        assert 0 <= position.incarnation < 1 << 32
        records.decode(records.PodRecord, records.encode(one.record))


@fuzzed
@given(st.lists(st.tuples(keys, values), max_size=8))
def test_scorers_and_workers_take_any_pod_worker_and_decision(found: list[tuple[Value, Value]]) -> None:
    """What they have taken in answers every question about pods, routes, layouts and load."""
    picker = PickerState(PickerSettings(), lambda: 5.0)
    picker.use([Endpoint("h:1", "p")])
    pods, workers, decisions = PodTable(), WorkerDirectory(lambda: 5), Decisions(ScorerSettings(), None)
    book, others = PodDirectory(), WorkerDirectory(lambda: 5)
    for key, value in found:
        pods.apply(key, value)
        workers.apply(key, value)
        if (record := decisions.apply(value, 5)) is not None:
            picker.take(record)
        book.apply(key, value)
        others.apply(key, value)
    pods.set_block_size(16)
    _ = pods.fleet, book.records(), book.ended(), book.gone_since(2**62), others.owner(0, "me")
    workers.route(0)
    _ = workers.uncovered(), workers.covered, workers.layout
    picker.measure()
    picker.sessions.get(["a" * 16], 5.0)
    decisions.expire(2**63)
    assert not decisions.open


@fuzzed
@given(key=keys, value=values, found=headers, topic=st.sampled_from([topic.name for topic in topics.TOPICS]))
def test_history_shows_any_record(key: Value, value: Value, found: Any, topic: str) -> None:
    """Lines, JSON, filters, playback and the reindexing's prompts."""
    record = a_record(key, value, found, topic)
    message = read_message(record)
    msgspec.json.encode(message.line())
    message.types()
    shown = describe(record)
    json.dumps(shown)
    if topic in _ROWS and "error" not in shown and "tombstone" not in shown:
        _ROWS[topic](shown)
    for wanted in (Wanted(), Wanted(pods=("p",), types=("stored",)), Wanted(models=("m",)), Wanted(keys=(bytes(16),))):
        matching = Filter(wanted)
        matching.events(record)
        matching.other(record)
    assert len(_frames(record, dict(found))[1]) == 8
    assert abs(_time_ms(record, dict(found)) - record.timestamp_ms) < 1e9
    list(Chains().add(record))


@fuzzed
@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.binary(max_size=60)), max_size=5))
def test_an_audit_takes_any_answer(found: list[tuple[bytes, bytes]]) -> None:
    """Values that are no holders are passed over."""
    compare(dict(found), {}, [records.PodRecord(pod="p", writer="bridge")])


TOKENS = list(range(64))


async def _score(indexer: Indexer) -> None:
    """What has been taken in answers every question."""
    await indexer.score_tokens(TOKENS, "m")
    await indexer.explain(TOKENS, "m")
    for record in indexer.pods():
        records.encode(record)
    await indexer.stats()


@settings(fuzzed, max_examples=100)
@given(st.lists(st.tuples(keys, values, headers), max_size=6))
def test_the_library_takes_any_event(found: list[tuple[Value, Value, tuple[tuple[str, bytes], ...]]]) -> None:
    """Records from a transport of the caller's own are applied or counted; the indexer goes on and ends cleanly."""

    async def work() -> None:
        async with Indexer() as indexer:
            for key, value, more in found:
                await indexer.apply_record(key, value, more)
            await _score(indexer)

    asyncio.run(work())


@settings(fuzzed, max_examples=100)
@given(st.lists(st.tuples(keys, values), max_size=8))
def test_a_replica_takes_any_pod_worker_and_block(found: list[tuple[Value, Value]]) -> None:
    """It scores and sweeps afterwards; the versions that it may move to have names that topics can have."""

    async def work() -> None:
        indexer = Indexer()
        replica = Replica(KafkaSettings(), indexer.backend, indexer._pods, indexer._set_block_size)
        replica._views = [PartitionView(indexer.backend, number) for number in range(3)]  # type: ignore[arg-type]
        replica._followers = [SimpleNamespace(caught_up=asyncio.Event(), failed=lambda: None)]  # type: ignore[list-item]
        indexer._source = replica
        for key, value in found:
            indexer._pods.apply(key, value)
            replica._worker(key, value)
            replica._blocks(key, value)
        await replica.sweep()
        await _score(indexer)
        assert len(topics.blocks_topic(replica._catalog.active)) < 64
        assert len(replica._catalog.versions) <= 64

    asyncio.run(work())


class _Server:
    """A mirror's server in memory, as the mirror uses it."""

    def __init__(self, position: bytes) -> None:
        self.positions, self.entries = {0: position}, {}  # type: ignore[var-annotated]

    async def agree(self, _layout: Any) -> str:
        return ""

    async def claim(self, number: int, _token: bytes) -> tuple[bool, bytes]:
        return True, self.positions[number]

    async def scan(self, _cursor: int) -> tuple[int, list[bytes]]:
        return 0, list(self.entries)

    async def pod_names(self, _number: int) -> list[bytes]:
        return []

    async def write(self, held: Any, chunks: Any, after: bytes = b"") -> None:
        for names, found in chunks:
            for name, value in zip(names, found, strict=True):
                self.entries[name] = value
        if after:
            self.positions[held.number] = b"" if after == b"-" else after


@settings(fuzzed, max_examples=100)
@given(found=st.lists(st.tuples(keys, values), max_size=8), position=st.binary(max_size=40))
def test_a_mirror_takes_any_changelog_and_position(found: list[tuple[Value, Value]], position: bytes) -> None:
    """Only block keys with holders, or removed ones, get into it; whatever the server's position is."""

    async def work() -> None:
        log, server, known = Changelog(), _Server(position), asyncio.Event()
        for key, value in found:
            log.put(key, value)
        mirror = Mirror(
            server,  # type: ignore[arg-type]
            Member({0: log}, 1),  # type: ignore[arg-type]
            pods=PodDirectory(),
            pods_known=known,
            name="m",
            layout=MirrorLayout(partitions=1, block_size_tokens=16, index_version="base"),
            max_age_seconds=1e12,
        )
        for _ in range(4):
            await mirror.turn()
        assert all(len(key) == KEY_BYTES for key in server.entries)
        assert all(value is None or len(value) % HOLDER_BYTES == 0 for value in server.entries.values())

    asyncio.run(work())


@settings(fuzzed, max_examples=100)
@given(st.lists(st.dictionaries(st.binary(max_size=8), st.one_of(values.map(lambda value: value or b""))), max_size=3))
def test_a_reader_of_a_mirror_takes_any_pod(found: list[dict[bytes, bytes]]) -> None:
    """Pods of any name and record, that come and go."""

    async def work() -> None:
        mirror, pods, seen = MirrorBackend(), PodTable(), iter([*found, {}])
        mirror.poll = lambda: asyncio.sleep(0, Snapshot(next(seen), {0: None}, frozenset()))  # type: ignore[method-assign]
        follower = MirrorFollower(mirror, pods, pods.set_block_size)
        for _ in (*found, {}):
            await follower._poll()
            _ = pods.fleet
        assert not pods.merged
        await mirror.close()

    asyncio.run(work())
