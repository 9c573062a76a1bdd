"""Prompts on engines whose cache is keyed by pairs of tokens, and prompts with tokens above 32 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest

from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.block_key import ahead_keys, block_keys, pack_tokens, pack_wide_tokens, root_key, wide_extra
from kvatlas.bridge.model.chain import block_extra
from kvatlas.bridge.model.events import Limits, Stored, Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.api.inputs import query_of, tokens_of
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.lookup import Answers
from kvatlas.scorer.scoring.pairs import PairedLookups, paired
from kvatlas.scorer.scoring.query import keys_of
from kvatlas.scorer.scoring.walk import Fleet, Walk, Weights
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import pack_holder


class Table:
    """Lookups over a dict; an empty answer for what nobody holds, None for what is away."""

    first_blocks = 0
    stale = False

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | None] = {}

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        assert deadline
        return Answers([self.values.get(key, b"") for key in keys], {})


def holder(name: str) -> bytes:
    return pack_holder(pod_ref(name), 0, Tier.GPU, 0, 0, 0)


async def test_a_prompt_is_found_under_both_names() -> None:
    """One pod holds blocks by their keys, another only with the token behind them."""
    records = [
        PodRecord(pod=name, writer="streams", model="m", block_size_tokens=16, pairs=name == "pairs")
        for name in ("plain", "pairs")
    ]
    fleet, table = Fleet(records, 16), Table()
    prompt = list(range(100, 149))  # three blocks and one token
    keys = block_keys(root_key("m"), pack_tokens(prompt), 16)
    stored = [*prompt[:32], 7, *prompt[33:]]  # the second block went on with another token
    names = ahead_keys(block_keys(root_key("m"), pack_tokens(stored), 16), pack_tokens(stored), 16)
    table.values = {key: holder("plain") for key in keys} | {name: holder("pairs") for name in names}
    lookups = paired(table, fleet, "m", keys, pack_tokens(prompt))
    assert isinstance(lookups, PairedLookups)
    steps = Walk(fleet.scene("m", Weights()), len(prompt), whole_prompt=True)
    answers = await lookups.lookup(keys, math.inf)
    steps.feed(answers.values)
    assert {match.pod.name: match.tokens for match in steps.matches()} == {"plain": 48, "pairs": 16}
    table.values[ahead_keys(keys, pack_tokens(prompt), 16)[0]] = None
    assert (await lookups.lookup(keys, math.inf)).values[0] is None


def test_fleets_without_pairs_are_asked_once() -> None:
    """Nothing is added to what other engines' prompts cost."""
    table, fleet = Table(), Fleet([PodRecord(pod="p", writer="streams", model="m")], 16)
    assert paired(table, fleet, "m", [], b"") is table
    assert not fleet.pairs("m")


@pytest.mark.parametrize("size", [16, 8])
async def test_tokens_above_32_bits_name_the_same_blocks_for_engine_and_prompt(size: int) -> None:
    """A picture's values, as SGLang puts them in place of its tokens, match a request that has them."""
    tokens = [*range(20), *([3809176584383908073, 3141011218867666772] * 5), *range(18)]
    event = {"type": "BlockStored", "block_hashes": [1, 2, 3], "parent_block_hash": None, "token_ids": tokens}
    event |= {"block_size": 16, "lora_id": None, "medium": "GPU"}
    [stored] = adapter("sglang")(msgspec.msgpack.encode((1.0, [event], 0)), Limits()).events
    assert isinstance(stored, Stored)
    told = block_keys(root_key("m"), stored.tokens, 16, block_extra(stored.extra, 16))
    request = pb.ScoreRequest(model="m", tokens=tokens)
    query = query_of(request, await tokens_of(request, ScorerSettings(), None, math.inf), 0.0)
    assert keys_of(query, 16) == told
    other = pb.ScoreRequest(model="m", tokens=[token % 2**32 for token in tokens])
    asked = keys_of(query_of(other, await tokens_of(other, ScorerSettings(), None, math.inf), 0.0), 16)
    assert asked[0] == told[0]
    assert asked[1] != told[1]
    packed, wide = pack_wide_tokens(tokens)
    assert packed == stored.tokens
    assert sum(map(len, wide_extra(wide, size, 48 // size))) == 10
