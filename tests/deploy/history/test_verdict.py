"""Where a lost hit went: the reasons that `kvatlas why` gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import DecisionRecord, GroupSpec, PodRecord
from kvatlas.deploy.history.verdict import judge, leading
from kvatlas.streams.index.holders import add_holder, pack_holder
from kvatlas.streams.resolve.resolver import ResolveOptions


@pytest.mark.parametrize(
    ("predicted", "before", "after", "reasons"),
    [
        (4, {"a": 4, "b": 1}, {"a": 4}, []),
        (2, {"a": 2}, {"a": 2}, ["never cached: 2 of 4"]),
        (1, {"a": 1, "b": 4}, {"a": 1}, ["routing: b held 3"]),
        (4, {"a": 1, "b": 4}, {"a": 1}, ["routing: b held 3", "stale view: 3 predicted blocks were gone"]),
        (1, {"a": 4}, {"a": 4}, ["stale view: 3 blocks were there"]),
        (4, {"a": 4}, {"a": 1}, ["eviction: 3 of the blocks"]),
        (3, {}, {}, ["never cached: 4 of 4", "stale view: 3 predicted"]),
    ],
)
def test_every_loss_has_its_reason(
    predicted: int, before: dict[str, int], after: dict[str, int], reasons: list[str]
) -> None:
    """A full hit has no reasons; never cached, routing, stale view and eviction are told apart, with their blocks."""
    decision = DecisionRecord(request_id="r", pod="a", keys=b"k" * 64, predicted_blocks=predicted)
    found = judge(decision, before, after)
    assert len(found.reasons) == len(reasons)
    assert all(text.startswith(start) for text, start in zip(found.reasons, reasons, strict=True))
    assert (found.held, found.later) == (before.get("a", 0), after.get("a", 0))


def test_blocks_that_speculation_computes_again_are_not_called_uncached() -> None:
    """The last block that the pod holds is missing from its match, and why is said."""
    decision = DecisionRecord(request_id="r", pod="a", keys=b"k" * 64, predicted_blocks=3)
    again = {"a": 1, "b": 1}
    assert judge(decision, {"a": 3}, {"a": 3}, again).reasons == [
        "speculation: a computes the last 1 of the blocks that it holds again"
    ]
    found = judge(decision, {"a": 2}, {"a": 2}, again).reasons
    assert found[0] == "never cached: 1 of 4 blocks were on no pod"
    assert judge(decision, {"a": 0}, {}, again).reasons[0] == "never cached: 4 of 4 blocks were on no pod"


KEYS = [bytes([number]) * 16 for number in range(4)]


def past(pods: list[PodRecord], blocks: dict[bytes, bytes]) -> Any:
    """A past state with these pods and values."""
    return SimpleNamespace(
        blocks=blocks, options=ResolveOptions(block_size_tokens=16), pods=lambda: {pod.pod: pod for pod in pods}
    )


def pod(name: str, model: str = "m", **fields: Any) -> PodRecord:
    return PodRecord(pod=name, writer="streams", model=model, block_size_tokens=16, **fields)


def value(*held: tuple[str, int, int]) -> bytes:
    """Holders of (pod or store, tier, group)."""
    found = b""
    for name, tier, group in held:
        ref = store_ref(name) if tier == Tier.SHARED else pod_ref(name)
        found = add_holder(found, pack_holder(ref, group, tier, 0, 0, 0))
    return found


DECISION = DecisionRecord(request_id="r", pod="a", model="m", keys=b"".join(KEYS), block_size_tokens=16)


async def test_what_was_held_is_what_the_scorer_counts_of_groups_and_windows() -> None:
    """A block in one of two groups is no hit; a window needs only its end; a chunk of the engine counts as a whole."""
    full, both = value(("a", Tier.GPU, 0)), value(("a", Tier.GPU, 0), ("a", Tier.GPU, 1))
    hybrid = pod("a", groups={0: GroupSpec(Kind.FULL, 0, 16), 1: GroupSpec(Kind.FULL, 0, 16)})
    window = pod("a", groups={0: GroupSpec(Kind.FULL, 0, 16), 1: GroupSpec(Kind.SLIDING_WINDOW, 17, 16)})
    found = dict(zip(KEYS, [both, full, full, both], strict=True))
    assert await leading(past([hybrid], found), DECISION) == {"a": 1}
    assert await leading(past([window], found), DECISION) == {"a": 4}
    assert await leading(
        past([pod("a", groups={0: GroupSpec(Kind.FULL, 0, 32)})], dict.fromkeys(KEYS[:3], full)), DECISION
    ) == {"a": 2}


async def test_a_shared_store_holds_blocks_for_the_pods_of_the_model_alone() -> None:
    """Pods of another model that mount the same store cannot read its blocks."""
    pods = [pod("a", store="s"), pod("b", model="other", store="s"), pod("c")]
    assert await leading(past(pods, dict.fromkeys(KEYS, value(("s", Tier.SHARED, 0)))), DECISION) == {
        "a": 4,
        "b": 0,
        "c": 0,
    }


async def test_what_had_ended_was_not_held() -> None:
    """A clear narrowed to the GPU and a removal count for a past state as they do for the scorer."""
    held = dict.fromkeys(KEYS, value(("a", Tier.GPU, 0)))
    assert await leading(past([pod("a", gpu_valid_from=epoch_of(1))], held), DECISION) == {"a": 0}
    assert await leading(past([pod("a", state="gone")], held), DECISION) == {}
