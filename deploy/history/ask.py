"""Questions to a past state: scores, the reason for them, and the pods, in the words of the live scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from kvatlas.bridge.model import block_key, pod_ids, records
from kvatlas.bridge.model.events import Tier
from kvatlas.deploy.history.rebuild import PastIndex
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk
from kvatlas.streams.index.holders import holders


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an input file.

    Attributes:
        tokens: token ids of the prompt.
        cache_salt, lora: as the request would carry them.
        pods: pod ids to consider; empty means all.
    """

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]]
    cache_salt: str | None = None
    lora: str | None = None
    pods: list[str] = []


def score(past: PastIndex, model: str, question: Question) -> dict[str, Any]:
    """Return the scores that the state gives, in the form of ``kvatlas score --json``."""
    size = past.options.block_size_tokens
    keys = _keys(past, model, question)
    values = [past.blocks.get(key) or b"" for key in keys]
    scene = Fleet(past.pods().values(), size).scene(model, Weights())
    matches, _ = walk(values, scene, len(question.tokens), pods=question.pods, whole_prompt=True)
    return {
        "scores": {
            match.pod.name: {
                "score": match.score,
                "matched_blocks": match.blocks,
                "matched_tokens": match.tokens,
            }
            for match in matches
        },
        "freshness": {"offsets": {str(part): offset for part, offset in sorted(past.offsets.items())}},
    }


def explain(past: PastIndex, model: str, question: Question) -> list[dict[str, Any]]:
    """Return, block by block, who held it as of the state and whether that counted."""
    pods = past.pods()
    by_ref = {pod_ids.pod_ref(name): record for name, record in pods.items()}
    stores = {pod_ids.store_ref(record.store): record.store for record in pods.values() if record.store}
    rows = []
    for number, key in enumerate(_keys(past, model, question)):
        found = []
        for holder in holders(past.blocks.get(key) or b""):
            record = by_ref.get(holder.pod_ref)
            name = record.pod if record else stores.get(holder.pod_ref, f"{holder.pod_ref:016x}")
            found.append(
                {
                    "pod": name,
                    "tier": Tier(holder.tier).name.lower(),
                    "group": holder.group,
                    "epoch": holder.epoch,
                    "state": _state(holder.tier, holder.epoch, record),
                }
            )
        rows.append({"number": number, "key": key.hex(), "holders": found})
    return rows


def pods(past: PastIndex) -> list[dict[str, Any]]:
    """Return the pods' records as of the state."""
    return [msgspec.to_builtins(record, str_keys=True) for record in past.pods().values()]


def _keys(past: PastIndex, model: str, question: Question) -> Sequence[bytes]:
    size = past.options.block_size_tokens
    packed = block_key.pack_tokens(question.tokens)
    root = block_key.root_key(model, question.lora, question.cache_salt)
    return block_key.block_keys(root, packed, size)


def _state(tier: int, epoch: int, record: records.PodRecord | None) -> str:
    if record is None:
        return "shared" if tier == Tier.SHARED else "unknown-pod"
    return record.validity.state(tier, epoch)
