"""The indexer library against real sockets: simulated fleets with their oracle, recorded streams, restarts, gaps."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from prometheus_client import CollectorRegistry

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer import Indexer, IndexerOptions, SyncIndexer
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownModelError, UnknownPodError
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.backends.memory import MemoryBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from kvatlas.scorer.library.metrics import IndexerCollector
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.streams.index.blocks_record import BlocksRecord
from tests import engine_events
from tests.faults import InjectedError, break_task, name_of, tasks_since
from tests.waiting import until

DATA = Path(__file__).parents[2] / "data"
MODEL = "sim-model"
OPTIONS = IndexerOptions()


def fleet_of(**options: Any) -> Fleet:
    fleet = Fleet(
        SimPlan(**{"pods": 3, "blocks": 300, "sessions": 12, **options}),
        clock=time.time,
        monotonic=time.monotonic,
    )
    fleet.start()
    return fleet


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Three simulated pods with small caches, so that blocks are evicted all the time."""
    made = fleet_of(cpu_blocks=150, salted_share=0.3, lora_share=0.3)
    yield made
    made.close()


@pytest.fixture
async def publisher() -> AsyncIterator[EnginePublisher]:
    """One engine of which the test sends every message."""
    made = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@one@m")
    made.start()
    yield made
    made.close()


def spec(publisher: EnginePublisher) -> str:
    return f"{publisher.endpoint},{publisher.replay_endpoint}"


def stored(number: int, blocks: int = 1, parent: int | None = None) -> dict[str, Any]:
    """A store of blocks of 16 tokens, engine keys and tokens numbered from ``number``."""
    tokens = [token for at in range(blocks) for token in tokens_of(number + at)]
    return engine_events.stored([number + at for at in range(blocks)], tokens, parent=parent)


def tokens_of(number: int) -> list[int]:
    return list(range(number * 16, number * 16 + 16))


async def truth_holds(indexer: Indexer, fleet: Fleet, requests: int) -> int:
    """Serve requests and compare every prompt's scores with the fleet's; returns how many pods scored."""
    served = fleet.serve(requests)
    await settled(indexer, fleet)
    hits = 0
    for request in served[-60:]:
        scored = await indexer.score_tokens(request.tokens, MODEL, lora=request.lora, cache_salt=request.cache_salt)
        expected = fleet.expect(request.tokens, lora=request.lora, cache_salt=request.cache_salt)
        got = {name.split("/")[0]: (s.matched_blocks, round(s.score, 6)) for name, s in scored.scores.items()}
        assert got == {name: (e.matched_blocks, round(e.score, 6)) for name, e in expected.items()}
        assert not scored.partial
        hits += len(got)
    return hits


async def settled(indexer: Indexer, fleet: Fleet) -> None:
    """Wait until every pod's newest message has been applied."""
    async with asyncio.timeout(90):
        while True:
            await indexer.caught_up(90)
            known = {record.pod: record.last_sequence for record in indexer.pods()}
            if all(known.get(status.pod, -1) == status.sequence for status in fleet.status()):
                return
            await asyncio.sleep(0.01)


async def test_a_fleet_s_own_answers(fleet: Fleet):
    """Under evictions, two tiers, salts and adapters, every score is what the simulated engines would reuse."""
    async with Indexer(options=OPTIONS, engines=fleet.engines) as indexer:
        assert await truth_holds(indexer, fleet, 150) > 60
        assert await truth_holds(indexer, fleet, 150) > 60
        assert indexer.counts["blocks_removed"] > 0


async def test_clears_and_restarts_leave_no_ghosts():
    """Caches that are cleared and engines that restart under load leave nothing that still scores."""
    fleet = fleet_of(clear_probability=0.03, restart_probability=0.03)
    try:
        async with Indexer(options=OPTIONS, engines=fleet.engines) as indexer:
            for _ in range(3):
                await truth_holds(indexer, fleet, 80)
            assert indexer.counts["control_restart"] > 0
            assert indexer.counts["clears"] > 0
    finally:
        fleet.close()


async def test_an_engine_that_was_there_before(fleet: Fleet):
    """What an engine published before the indexer came is asked for and scores."""
    fleet.serve(60)
    async with Indexer(options=OPTIONS, engines=fleet.engines) as indexer:
        await settled(indexer, fleet)
        assert await truth_holds(indexer, fleet, 30) > 10


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
async def test_recorded_streams_through_the_sockets(pod: str):
    """A real engine's recorded messages, sent as they were, give every hit that the engine reported itself."""
    raw = gzip.decompress((DATA / "captures" / f"{pod}.frames.gz").read_bytes())
    frames = list(msgpack.Unpacker(io.BytesIO(raw), raw=True))
    truth = json.loads(gzip.decompress((DATA / "captures" / f"{pod}.truth.json.gz").read_bytes()))
    publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=frames[0][0].decode())
    publisher.start()
    try:
        async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
            for _, _, payload in frames:
                publisher.publish_raw(payload)
            await until(lambda: indexer.pods() and indexer.pods()[0].last_sequence == len(frames) - 1)
            hits = 0
            for query in truth["queries"]:
                scored = await indexer.score_tokens(query["tokens"], "demo-model", cache_salt=query["cache_salt"])
                found = scored.scores.get(scored.best)
                assert (found.matched_tokens if found else 0) == query["hit_tokens"]
                hits += bool(found)
            assert hits > 0
    finally:
        publisher.close()


def last(indexer: Indexer, pod: str = "one") -> int:
    return next((record.last_sequence for record in indexer.pods() if record.pod == pod), -1)


async def test_a_missed_message_is_asked_for(publisher: EnginePublisher):
    """A message that never came live is repaired by replay, and nothing is suspect."""
    async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
        publisher.publish([stored(1)], timestamp=1.0)
        await until(lambda: last(indexer) == 0)
        feed = indexer._feed  # the only way to lose a message between two sockets that lose none
        stream = feed.streams.endpoints[publisher.endpoint]
        receive, stream._socket._receive = stream._socket._receive, lambda frames: None
        publisher.publish([stored(2, parent=1)], timestamp=2.0)
        await asyncio.sleep(0.1)
        stream._socket._receive = receive
        publisher.publish([stored(3, parent=2)], timestamp=3.0)
        await until(lambda: last(indexer) == 2)
        scored = await indexer.score_tokens([*tokens_of(1), *tokens_of(2), *tokens_of(3)], "m")
        assert scored.scores["one"].matched_blocks == 3
        assert scored.scores["one"].suspect_blocks == 0


async def test_a_hole_that_cannot_be_repaired_makes_older_blocks_suspect(publisher: EnginePublisher):
    """After messages are lost for good, what was there before counts half and says so; what comes after counts full."""
    async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
        publisher.publish([stored(1)], timestamp=1.0)
        await until(lambda: last(indexer) == 0)
        publisher.skip()
        publisher.publish([stored(2, parent=1)], timestamp=3.0)
        await until(lambda: last(indexer) == 2)
        found = (await indexer.score_tokens([*tokens_of(1), *tokens_of(2)], "m")).scores["one"]
        assert (found.matched_blocks, found.suspect_blocks, found.score) == (2, 1, 1.5)
        record = indexer.pods()[0]
        assert (record.first_lost, record.last_lost, record.lost) == (1, 1, 1)


async def test_a_restarted_engine_starts_empty(publisher: EnginePublisher):
    """Sequences from 0 again: nothing stored before scores; what the new process stores does."""
    async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
        publisher.publish([stored(1, 3)], timestamp=1.0)
        publisher.publish([stored(10)], timestamp=1.1)
        await until(lambda: last(indexer) == 1)
        epoch = indexer.pods()[0].epoch
        publisher.close()
        reborn = EnginePublisher(publisher.endpoint, publisher.replay_endpoint, topic="kv@one@m", bind=True)
        reborn.start()
        try:
            reborn.publish([stored(20)], timestamp=5.0)
            await until(lambda: indexer.pods()[0].epoch > epoch and last(indexer) == 0)
            assert not (await indexer.score_tokens(tokens_of(1), "m")).scores
            assert (await indexer.score_tokens(tokens_of(20), "m")).best == "one"
            await until(lambda: indexer.counts["holders_swept"] == 4)
        finally:
            reborn.close()


async def test_engines_come_and_go(fleet: Fleet):
    """A removed pod scores no more and leaves the index; added again it is read anew, at once."""
    async with Indexer(options=OPTIONS) as indexer:
        for engine in fleet.engines:
            await indexer.add_engine(engine)
        await truth_holds(indexer, fleet, 60)
        await indexer.remove_engine("pod-1")
        assert [record.pod for record in indexer.pods(MODEL)] == ["pod-0", "pod-2"]
        assert "pod-1" not in indexer._feed.applier._views  # what was known of its engine keys has gone too
        with pytest.raises(UnknownPodError, match="pod-1"):
            await indexer.remove_engine("pod-1")
        await indexer.add_engine(fleet.engines[1])
        await settled(indexer, fleet)
        assert await truth_holds(indexer, fleet, 10) > 0


async def test_the_second_engine_of_a_pod_takes_over(publisher: EnginePublisher):
    """Of two engines that name one pod one is read; when it has left, the other is, without a word from its engine."""
    other = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@one@m")
    other.start()
    try:
        async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
            publisher.publish([stored(1)], timestamp=1.0)
            await until(lambda: last(indexer) == 0)
            await indexer.add_engine(spec(other))
            other.publish([stored(2)], timestamp=2.0)
            second = indexer.engines[other.endpoint]
            await until(lambda: second.waiting)
            await indexer.remove_engine(
                other.endpoint
            )  # leaving one that waits takes nothing from the one that is read
            assert (await indexer.score_tokens(tokens_of(1), "m")).best == "one"
            await indexer.add_engine(spec(other))
            other.publish([stored(3)], timestamp=3.0)
            second = indexer.engines[other.endpoint]
            await until(lambda: second.waiting)
            await indexer.remove_engine(publisher.endpoint)
            async with asyncio.timeout(90):
                while not (await indexer.score_tokens(tokens_of(2), "m")).scores:
                    await asyncio.sleep(0.01)
            assert not second.waiting
            assert not (await indexer.score_tokens(tokens_of(1), "m")).scores
    finally:
        other.close()


async def test_caught_up_waits_for_the_first_answer(publisher: EnginePublisher):
    """What an engine had published before it was added is in the index then, and one that does not answer is named."""
    publisher.publish([stored(1)], timestamp=1.0)
    async with Indexer(options=OPTIONS) as indexer:
        await indexer.add_engine(spec(publisher))
        await indexer.caught_up(90)
        assert (await indexer.score_tokens(tokens_of(1), "m")).best == "one"
        await indexer.add_engine("tcp://127.0.0.1:1,tcp://127.0.0.1:2")
        with pytest.raises(NotReadyError, match=r"tcp://127\.0\.0\.1:1"):
            await indexer.caught_up(0.05)


async def test_only_the_pods_asked_for(fleet: Fleet):
    """A pod filter leaves the others out of the answer."""
    async with Indexer(options=OPTIONS, engines=fleet.engines) as indexer:
        served = fleet.serve(40)
        await settled(indexer, fleet)
        for request in served:
            scored = await indexer.score_tokens(request.tokens, MODEL, pods=["pod-2"])
            assert set(scored.scores) <= {"pod-2"}


async def test_explain_names_holders_and_ends(publisher: EnginePublisher):
    """Explain lists who holds each block and says at which block, and why, a match ends."""
    async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
        publisher.publish([stored(1, 2)], timestamp=1.0)
        await until(lambda: last(indexer) == 0)
        explained = await indexer.explain([*tokens_of(1), *tokens_of(2), *tokens_of(3)], "m")
        assert [[h.pod for h in block.holders] for block in explained.blocks] == [["one"], ["one"], []]
        assert explained.ends == {"one": "block 2: not held on any tier"}
        assert explained.scored.scores["one"].matched_tokens == 32
        assert bytes.fromhex(explained.blocks[0].key) == indexer.block_keys(tokens_of(1), "m")[0]
        publisher.publish([{"type": "AllBlocksCleared"}], timestamp=2.0)
        await until(lambda: last(indexer) == 1)
        explained = await indexer.explain(tokens_of(1), "m")
        if explained.blocks[0].holders:  # not swept yet
            assert explained.blocks[0].holders[0].state == "dead"
            assert "which ended" in explained.ends["one"]


async def test_a_queue_that_is_full_loses_nothing():
    """With room for a few messages only, the rest is left to replay, and the scores are right in the end."""
    fleet = fleet_of(blocks=2000)
    options = IndexerOptions(bridge=BridgeSettings(buffer_bytes=4096))
    try:
        async with Indexer(options=options, engines=fleet.engines) as indexer:
            await truth_holds(indexer, fleet, 20)  # all are heard now, so what follows comes in one burst
            await truth_holds(indexer, fleet, 100)
            counts = [engine.session.tracker.counts for engine in indexer.engines.values()]
            assert sum(count.shed for count in counts) > 0
            assert sum(count.lost for count in counts) == 0
    finally:
        fleet.close()


class Flaky(MemoryBackend):
    """An index that does not answer for a while."""

    away = False

    async def lookup(self, keys: Any) -> list[bytes]:
        if self.away:
            raise BackendError("away")
        return await super().lookup(keys)

    async def apply(self, record: BlocksRecord) -> None:
        if self.away:
            raise BackendError("away")
        await super().apply(record)


async def test_an_index_that_is_away_for_a_while(publisher: EnginePublisher):
    """Meanwhile scores are partial, not empty truths; updates wait and are applied once it is back."""
    backend = Flaky()
    async with Indexer(backend, OPTIONS, engines=[spec(publisher)]) as indexer:
        publisher.publish([stored(1)], timestamp=1.0)
        await until(lambda: last(indexer) == 0)
        backend.away = True
        publisher.publish([stored(2, parent=1)], timestamp=2.0)
        await asyncio.sleep(0.2)
        scored = await indexer.score_tokens(tokens_of(1), "m")
        assert scored.partial
        assert not scored.scores
        backend.away = False
        await until(lambda: last(indexer) == 1)
        scored = await indexer.score_tokens([*tokens_of(1), *tokens_of(2)], "m")
        assert (scored.partial, scored.scores["one"].matched_blocks) == (False, 2)


async def test_a_lasting_index_opened_again_counts_nothing_old(publisher: EnginePublisher, tmp_path: Path):
    """A program that comes back finds its RocksDB, and scores only what the engine still vouches for."""
    publisher.publish([stored(1)], timestamp=1.0)
    for _ in range(2):
        async with Indexer(RocksBackend(tmp_path / "index"), OPTIONS, engines=[spec(publisher)]) as indexer:
            await until(lambda indexer=indexer: last(indexer) == 0)
            assert (await indexer.score_tokens(tokens_of(1), "m")).best == "one"
        await asyncio.sleep(1.1)  # an incarnation is named by its second


async def test_prompts_and_chats_as_the_engine_tokenizes_them(publisher: EnginePublisher):
    """A text scores exactly what its token ids score."""
    settings = TokenizerSettings(models=(f"m={DATA / 'tokenizer'}",))
    text = "the prefix of a long prompt that many people share before their own question " * 12
    async with TokenizerPool(settings) as pool:
        ids = (await pool.encode("m", text)).list()
        blocks = len(ids) // 16
        async with Indexer(options=OPTIONS, engines=[spec(publisher)], tokenizers=pool) as indexer:
            event = stored(1, blocks) | {"token_ids": ids[: blocks * 16]}
            publisher.publish([event], timestamp=1.0)
            await until(lambda: last(indexer) == 0)
            scored = await indexer.score_prompt(text, "m")
            assert scored.scores["one"].matched_blocks == blocks
            assert (scored.prompt_tokens, scored.tokenizer) == (len(ids), "local")
            chat = await indexer.score_chat([{"role": "user", "content": text}], "m")
            assert chat.prompt_tokens > len(ids) // 2
        async with Indexer() as bare:
            with pytest.raises(UnknownModelError, match="tokenizers"):
                await bare.score_prompt(text, "m")


async def test_what_cannot_be_read_is_left_out_alone(publisher: EnginePublisher, caplog: pytest.LogCaptureFixture):
    """A bad event spares the rest of its message, a bad message the rest of the stream; the log has the first only."""
    async with Indexer(options=OPTIONS, engines=[spec(publisher)]) as indexer:
        bad = stored(5) | {"token_ids": "text"}
        publisher.publish([bad, stored(1)], timestamp=1.0)
        publisher.publish_raw(b"\xc1 no message")
        publisher.publish([stored(2, parent=1)], timestamp=2.0)
        await until(lambda: last(indexer) == 2)
        scored = await indexer.score_tokens([*tokens_of(1), *tokens_of(2)], "m")
        assert (scored.scores["one"].matched_blocks, scored.scores["one"].suspect_blocks) == (2, 0)
        assert (indexer.counts["events_dead"], indexer.counts["messages_dead"]) == (1, 1)
        assert len([r for r in caplog.records if r.levelname == "WARNING" and "left out" in r.message]) == 1


async def refusal(indexer: Indexer) -> NotReadyError:
    """Ask until no score is given any more; returns why."""
    async with asyncio.timeout(90):
        while True:
            try:
                await indexer.score_tokens(tokens_of(1), "m")
            except NotReadyError as error:
                return error
            await asyncio.sleep(0.01)


async def test_an_error_in_any_background_task_is_shown(publisher: EnginePublisher, tmp_path: Path):
    """Task by task: no score is given on what nobody keeps up to date, the reason is, and nothing hangs at the end."""
    publisher.publish([stored(1)], timestamp=1.0)
    broken: set[str] = set()
    while True:
        before = asyncio.all_tasks()
        async with Indexer(RocksBackend(tmp_path / "index"), OPTIONS, engines=[spec(publisher)]) as indexer:
            await until(lambda indexer=indexer: last(indexer) == 0)
            task = next((one for one in tasks_since(before) if name_of(one) not in broken), None)
            if task is None:
                break
            broken.add(name_of(task))
            await break_task(task)
            error = await refusal(indexer)
            assert str(error).startswith(f"the indexer has stopped reading: {task.get_name()}")
            assert isinstance(error.__cause__, InjectedError)
    assert broken == {"Feed._run", "Feed._tick", "Applier._sweep", "EngineEndpoint._repair"}


async def test_metrics_say_what_happened(publisher: EnginePublisher):
    """A scrape has what was applied, the queues and each stream's tracking; every score tells its stages."""
    stages: list[str] = []
    indexer = Indexer(options=OPTIONS, engines=[spec(publisher)], observe=lambda stage, seconds: stages.append(stage))
    registry = CollectorRegistry()
    registry.register(IndexerCollector(indexer))
    async with indexer:
        publisher.publish([stored(1, 3)], timestamp=1.0)
        publisher.skip()
        publisher.publish([stored(9)], timestamp=2.0)
        await until(lambda: last(indexer) == 2)
        await indexer.caught_up()
        assert registry.get_sample_value("kvatlas_indexer_applied_total", {"what": "blocks_stored"}) == 4
        assert registry.get_sample_value("kvatlas_indexer_pods") == 1
        assert registry.get_sample_value("kvatlas_indexer_queue_bytes", {"pod": "one"}) == 0
        assert registry.get_sample_value("kvatlas_bridge_gaps_total", {"pod": "one"}) == 1
        assert registry.get_sample_value("kvatlas_bridge_last_sequence", {"pod": "one"}) == 2
        await indexer.score_tokens(tokens_of(1), "m")
        assert stages == ["keys", "lookup", "score"]
    assert registry.get_sample_value("kvatlas_indexer_pods") is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Indexer(engines="tcp://127.0.0.1:1"), "collection"),
        (lambda: Indexer("redis://127.0.0.1:1/0"), "RedisBackend"),
        (lambda: Indexer(options=IndexerOptions(block_size_tokens=0)), "block_size_tokens"),
        (lambda: MemoryBackend(0), "max_entries"),
        (lambda: MemoryBackend(None, max_bytes=-1), "max_bytes"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, match: str):
    """An argument that cannot mean anything is named before anything is opened."""
    with pytest.raises(InputError, match=match):
        make()


async def test_what_makes_no_sense_is_refused():
    """Requests and calls that cannot mean anything name what is wrong."""
    indexer = Indexer()
    with pytest.raises(NotReadyError, match="not started"):
        await indexer.score_tokens([1], "m")
    async with indexer:
        assert not (await indexer.score_tokens([], "m")).scores
        with pytest.raises(InputError, match="model"):
            await indexer.score_tokens([1], "")
        with pytest.raises(InputError, match="tokens"):
            await indexer.score_tokens([-1], "m")
        with pytest.raises(InputError, match="multiple of 4"):
            await indexer.score_tokens(b"abc", "m")
        with pytest.raises(InputError, match="pods"):
            await indexer.score_tokens([1], "m", pods="one")
        with pytest.raises(InputError, match=r"multimodal\[0\]"):
            await indexer.score_tokens([1] * 16, "m", multimodal=[("image", 8, 9)])
        with pytest.raises(SettingsError, match="neither"):
            await indexer.add_engine("nonsense")
        with pytest.raises(InputError, match="started already"):
            await indexer.start()


def test_the_same_without_a_loop(fleet: Fleet):
    """The blocking facade gives the same answers, and ends its thread."""
    with SyncIndexer(lambda: Indexer(options=OPTIONS, engines=fleet.engines)) as indexer:
        served = fleet.serve(40)
        deadline = time.monotonic() + 90
        while {r.pod: r.last_sequence for r in indexer.pods()} != {s.pod: s.sequence for s in fleet.status()}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        request = served[-1]
        scored = indexer.score_tokens(request.tokens, MODEL, lora=request.lora, cache_salt=request.cache_salt)
        expected = fleet.expect(request.tokens, lora=request.lora, cache_salt=request.cache_salt)
        assert {n: s.matched_blocks for n, s in scored.scores.items()} == {
            n: e.matched_blocks for n, e in expected.items()
        }
        indexer.add_approximate("predicted", MODEL, 100)
        assert indexer.note_decision("predicted", request.tokens, MODEL)
        assert not indexer.note_decision("pod-0", request.tokens, MODEL)
        assert "predicted" in indexer.score_tokens(request.tokens, MODEL).scores
        assert indexer.counts["blocks_stored"] > 0
        assert indexer.stats().entries > 0
    with pytest.raises(NotReadyError):
        indexer.score_tokens([1], MODEL)
