"""The library's answers beside the service's: the same fields, strategies and numbers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.scorer import Indexer, IndexerOptions
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.answers import BlockInfo, HolderInfo, PodFreshness, PodScore, Scored
from kvatlas.scorer.scoring.strategies import STRATEGIES
from kvatlas.scorer.scoring.walk import Weights
from kvatlas.scorer.v1 import scorer_pb2 as pb


def fields(message: Any) -> set[str]:
    """Names of a message's fields."""
    return {field.name for field in message.DESCRIPTOR.fields}


def test_answers_have_the_service_s_fields():
    """What differs is named here: freshness is flat and stages are a dict."""
    assert fields(pb.PodScore) == set(PodScore.__struct_fields__)
    assert fields(pb.PodFreshness) == set(PodFreshness.__struct_fields__)
    assert fields(pb.HolderInfo) == set(HolderInfo.__struct_fields__)
    assert fields(pb.ScoreResponse) - set(Scored.__struct_fields__) == {"stages", "error"}
    assert set(Scored.__struct_fields__) - fields(pb.ScoreResponse) == {"partitions", "partial", "stale", "took_ms"}
    assert fields(pb.BlockInfo) == set(BlockInfo.__struct_fields__)


def test_weights_are_the_service_s():
    """The same defaults, tier by tier."""
    weights = msgspec.structs.asdict(Weights())
    settings = msgspec.structs.asdict(ScorerSettings())
    for name, value in weights.items():
        if (setting := name if name == "suspect_factor" else f"weight_{name}") in settings:
            assert settings[setting] == value
    assert {"weight_cpu", "weight_disk", "weight_shared", "suspect_factor"} <= settings.keys()


@pytest.mark.parametrize(
    ("strategy", "expected"), [("longest-prefix", 1.8), ("normalised", 0.6), ("tokens", 32.0), ("gpu-only", 1.0)]
)
async def test_every_strategy_of_the_service(strategy: str, expected: float):
    """Of three blocks one is on the GPU, one in host memory and one nowhere."""
    assert strategy in STRATEGIES
    stored = {"type": "BlockStored", "block_size": 16, "parent_block_hash": None}
    events = [
        stored | {"block_hashes": [1, 2], "token_ids": list(range(32)), "medium": "GPU"},
        stored | {"block_hashes": [2], "token_ids": [], "medium": "CPU"},
        {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"},
    ]
    async with Indexer(options=IndexerOptions(strategy=strategy)) as indexer:
        payload = msgspec.msgpack.encode((1.0, events))
        await indexer.apply_record(b"one", payload, [("sequence", b"0"), ("model", b"m")])
        assert (await indexer.score_tokens(range(48), "m")).scores["one"].score == pytest.approx(expected)


def test_a_strategy_nobody_knows_is_refused():
    """The error lists those that exist."""
    with pytest.raises(InputError, match="longest-prefix"):
        Indexer(options=IndexerOptions(strategy="vibes"))
