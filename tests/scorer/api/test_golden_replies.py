"""Replies of the service, message by message, as they were recorded: the wire says what it has always said."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.records import encode
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.lookups.index import Index
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.scorer import Chunks
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.fleets import MODEL, NOW_NS, PARTITIONS, SIZE, RandomFleet, TableLookup

GOLDEN: Final = Path(__file__).parents[2] / "data" / "scorer" / "replies.json.gz"
FLEETS: Final = 60


async def replies(seed: int) -> dict[str, Any]:
    """What a scorer over one random fleet answers to every operation."""
    dice = random.Random(seed)
    fleet = RandomFleet(dice)
    pods = PodTable()
    for record in fleet.pods:
        pods.apply(f"streams|{record.pod}".encode(), encode(record))
    core = Core(
        ScorerSettings(
            name="golden",
            strategy=dice.choice(("longest-prefix", "normalised", "tokens", "gpu-only")),
            suspect_factor=dice.choice((0.5, 0.0)),
        ),
        Index(pods, TableLookup(fleet), lambda: SIZE, lambda: PARTITIONS),
        chunks=Chunks(dice.choice((2, 1024)), 16_384),
        clock_ns=lambda: NOW_NS,
    )
    for made in fleet.decisions:
        core.decisions.put(made, NOW_NS)
    request = pb.ScoreRequest(
        model=MODEL,
        tokens=fleet.tokens,
        cache_salt=fleet.salt,
        pods=dice.choice(([], [], ["a", "b"])),
        usable_only=dice.random() < 0.4,
        request_id="asked",
    )
    one, two = fleet.pods[0].pod, fleet.pods[-1].pod
    picked = pb.PickRequest(request=request, load={one: pb.PodLoad(waiting=3)}, tie_break="hash", report=True)
    calls = {
        "score": lambda: core.score(request),
        "explain": lambda: core.explain(request),
        "pick": lambda: core.pick(picked),
        "report": lambda: core.report(pb.ReportDecisionRequest(request_id="asked", pod=two)),
        "batch": lambda: core.score_batch(pb.ScoreBatchRequest(requests=[request, pb.ScoreRequest(tokens=[1])])),
        "score-decided": lambda: core.score(request),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            found[name] = plain(MessageToDict(await call(), preserving_proto_field_name=True))
        except KvatlasError as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["outcomes"] = [plain(record_of(await core.judge(made))) for made in core.decisions.open.values()]
    return found


def record_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("pod", "predicted_blocks", "real_blocks", "outcome", "kind")}


def plain(found: Any) -> Any:
    """Drop what is time, so that the rest can be compared."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items() if key != "stages"}
    return [plain(each) for each in found] if isinstance(found, list) else found


@pytest.mark.parametrize("seed", range(FLEETS))
async def test_replies_are_those_recorded(seed: int) -> None:
    """Scores, freshness, picks, explanations, decisions, outcomes and errors of fleets of every kind."""
    recorded = json.loads(gzip.decompress(GOLDEN.read_bytes()))[seed]
    assert json.loads(json.dumps(await replies(seed))) == recorded
