"""Speculative decoding in vLLM (EAGLE): what its cache manager reuses of each prompt, and what is predicted of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk

#: Made by the cache manager of vLLM 0.32: each request's tokens, its hit, and the events that it caused.
GOLDEN = json.loads(
    gzip.decompress((Path(__file__).parents[2] / "data" / "captures" / "golden_vllm_eagle.json.gz").read_bytes())
)


def _predicted(w, tokens: list[int]) -> int:
    fleet = Fleet(w.pods.values(), w.options.block_size_tokens)
    values = [w.value(key) for key in w.keys(tokens)]
    return sum(match.tokens for match in walk(values, fleet.scene("demo", Weights()), len(tokens))[0])


@pytest.mark.parametrize("case", sorted(GOLDEN))
def test_predictions_are_what_vllm_reuses(world, case: str) -> None:
    """Evictions, prompts of whole blocks and windows included; without the option some would be a block too long.

    vLLM with groups of several kinds looks one block past the last token's limit, which shows where a prompt ends
    with a block: a lookup asks for none of that, so the prediction is the block less.
    """
    spec = parse_engine("tcp://e:1,speculation=eagle3")[0]
    headers = {name: value.decode() for name, value in spec.headers()}
    w, plain = world(block_size_tokens=16), world(block_size_tokens=16)
    differ = 0
    for step in GOLDEN[case]["steps"]:
        tokens, hit = step["tokens"], step["hit"]
        spared = 16 if case == "hybrid" and len(tokens) % 16 == 0 and hit == len(tokens) - 16 else 0
        assert _predicted(w, tokens) == hit - spared
        differ += _predicted(plain, tokens) != hit
        if step["batch"]:
            w.raw("p", bytes.fromhex(step["batch"]), **headers)
            plain.raw("p", bytes.fromhex(step["batch"]))
    assert differ > len(GOLDEN[case]["steps"]) // 3
