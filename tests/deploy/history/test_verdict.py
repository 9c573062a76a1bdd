"""Where a lost hit went: the reasons that `kvatlas why` gives."""

from __future__ import annotations

import pytest

from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.deploy.history.verdict import judge


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
