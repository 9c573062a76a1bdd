"""Library and service give the same answer, field by field, whatever holds the index."""

from __future__ import annotations

import random
import time
from collections import Counter

import msgspec
import pytest

from kvatlas.bridge.model.pod_ids import WRITER_STREAMS
from kvatlas.bridge.model.records import PodRecord, encode
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.library.backends import Backend
from kvatlas.scorer.library.options import IndexerOptions
from kvatlas.scorer.library.scores import Scores
from kvatlas.scorer.lookups.index import Index
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.answers import Explained, Scored
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.blocks_record import OP_ADD, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import HOLDER_BYTES
from tests.scorer.fleets import MODEL, NOW_NS, PARTITIONS, SIZE, RandomFleet, TableLookup

FLEETS = 12
_FILLED = Counter[str]()


class _Told:
    """A source of updates that a test writes itself."""

    stale = False
    rebuilding = False
    caught_up = True

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def failed(self) -> None:
        return None

    async def stop(self) -> None: ...


class _Library(Scores):
    """The library's scores over a backend that a test fills."""

    def __init__(self, backend: Backend, options: IndexerOptions, pods: list[PodRecord]) -> None:
        super().__init__(backend, options, tokenizers=None, clock=lambda: NOW_NS, observe=lambda _stage, _seconds: None)
        self._source = _Told()
        for record in pods:
            self._pods.put(WRITER_STREAMS, record.pod, record)


async def _fill(backend: Backend, fleet: RandomFleet) -> None:
    """Write a table into an index, as updates of one more pod than the fleet has, so that none is late."""
    cut = [
        (key, value[at : at + HOLDER_BYTES])
        for key, value in fleet.table.items()
        for at in range(0, len(value), HOLDER_BYTES)
    ]
    _FILLED["sequence"] += 1
    sequence = time.time_ns() + _FILLED["sequence"]
    payload = encode_blocks(
        [Run(9, 0, sequence, sequence, len(cut))],
        b"".join(key for key, _ in cut),
        bytes([OP_ADD] * len(cut)),
        b"".join(holder for _, holder in cut),
        0,
    )
    if cut:
        await backend.apply(decode_blocks(payload))


def _plain(scored: Scored) -> Scored:
    return msgspec.structs.replace(scored, partitions={}, took_ms={})


def _blocks(explained: Explained) -> list[object]:
    return [msgspec.structs.replace(block, partition=0) for block in explained.blocks]


@pytest.mark.parametrize("strategy", ["longest-prefix", "normalised", "tokens", "gpu-only"])
async def test_the_same_fleet_has_the_same_answer(backend: Backend, strategy: str) -> None:
    """Scores, tiers, suspects, freshness, partial, holders and reasons; for pods asked for, and for usable blocks."""
    compared = 0
    for seed in range(FLEETS):
        dice = random.Random(f"{strategy} {seed}")
        # Blocks of its own for each fleet, since one index serves all tests of a backend.
        _FILLED["tokens"] += 1
        fleet = RandomFleet(dice, silent=False, guesses=False, first_token=_FILLED["tokens"] << 10)
        await _fill(backend, fleet)
        usable_only, wanted = dice.random() < 0.5, dice.choice(([], ["a", "c"]))
        options = IndexerOptions(block_size_tokens=SIZE, strategy=strategy, usable_only=usable_only)
        library = _Library(backend, options, fleet.pods)
        table = PodTable()
        for record in fleet.pods:
            table.apply(f"streams|{record.pod}".encode(), encode(record))
        service = Core(
            ScorerSettings(name="same"),
            Index(table, TableLookup(fleet), lambda: SIZE, lambda: PARTITIONS),
            clock_ns=lambda: NOW_NS,
        )
        request = pb.ScoreRequest(
            model=MODEL,
            tokens=fleet.tokens,
            cache_salt=fleet.salt,
            pods=wanted,
            strategy=strategy,
            usable_only=usable_only,
        )
        run = await service.run(request, all_blocks=True)
        salt = fleet.salt or None
        scored = await library.score_tokens(fleet.tokens, MODEL, cache_salt=salt, pods=wanted)
        assert _plain(scored) == _plain(run.scored)
        assert list(scored.scores) == list(run.scored.scores)
        explained, there = await library.explain(fleet.tokens, MODEL, cache_salt=salt, pods=wanted), run.explained()
        assert (_blocks(explained), explained.ends) == (_blocks(there), there.ends)
        compared += len(scored.scores)
    assert compared > FLEETS // 2
