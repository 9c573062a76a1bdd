"""Open decisions as pure state: who holds what speculatively, for how long, and in which bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord, encode
from kvatlas.scorer.errors import UnknownPodError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.decisions import OUTCOME, Decisions
from kvatlas.scorer.scoring.remembered import Remembered
from kvatlas.scorer.scoring.walk import SPECULATIVE
from kvatlas.streams.index.holders import pack_holder
from tests.scorer.rig import KEYS

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND


def _record(
    request_id: str = "r", pod: str = "a", blocks: int = 4, seconds: float = 5, **fields: Any
) -> DecisionRecord:
    return DecisionRecord(
        request_id=request_id,
        pod=pod,
        pod_epoch=7,
        model="m",
        keys=b"".join(KEYS[:blocks]),
        decided_ns=NOW,
        expires_ns=NOW + int(seconds * SECOND),
        **fields,
    )


def _held(decisions: Decisions, now_ns: int = NOW) -> list[bytes | None]:
    return decisions.overlay(b"".join(KEYS), 0, [b""] * len(KEYS), now_ns)


def _holder(pod: str = "a") -> bytes:
    return pack_holder(pod_ref(pod), 0, SPECULATIVE, 0, 0, 7)


def test_a_decision_vouches_for_its_prompt_until_it_expires() -> None:
    """Its blocks have one more holder, of the pod's epoch then; at the end of its time nothing is left of it."""
    decisions = Decisions(ScorerSettings())
    decisions.put(_record(), NOW)
    assert _held(decisions) == [_holder()] * 4 + [b""] * 6
    assert _held(decisions, NOW + 5 * SECOND - 1) == [_holder()] * 4 + [b""] * 6
    assert _held(decisions, NOW + 5 * SECOND) == [b""] * 10
    assert decisions.open == {}


def test_what_the_index_says_stays_and_no_answer_stays_none() -> None:
    """Speculative holders are added behind real ones; a block without an answer is not vouched for."""
    decisions = Decisions(ScorerSettings())
    decisions.put(_record(), NOW)
    real = pack_holder(pod_ref("b"), 0, 1, 0, 0, 1)
    assert decisions.overlay(b"".join(KEYS), 2, [b"", real, b"", None], NOW) == [_holder(), real + _holder(), b"", None]
    assert decisions.overlay(b"".join(KEYS[:3]), 0, [real, None, b""], NOW) == [real + _holder(), None, _holder()]


def test_two_decisions_for_one_pod_are_one_holder() -> None:
    """A burst of one prefix to one pod adds one holder a block, and it stays until the last of them ends."""
    decisions = Decisions(ScorerSettings())
    for number in range(5):
        decisions.put(_record(f"r{number}", seconds=number + 1), NOW)
    decisions.put(_record("other", pod="b", blocks=1, seconds=1), NOW)
    assert _held(decisions)[0] in (_holder("a") + _holder("b"), _holder("b") + _holder("a"))
    assert _held(decisions)[1:4] == [_holder()] * 3
    assert _held(decisions, NOW + int(4.5 * SECOND))[0] == _holder()
    assert _held(decisions, NOW + 5 * SECOND)[0] == b""


def test_a_burst_of_one_prefix_is_counted_and_not_kept_one_by_one() -> None:
    """A thousand decisions for one pod and prefix leave one holder a block; the last one to end takes it along."""
    decisions = Decisions(ScorerSettings())
    for number in range(1_000):
        decisions.put(_record(f"r{number}"), NOW)
    assert len(decisions._tree) == 1
    assert _held(decisions)[0] == _holder()
    decisions.put(_record("last", seconds=6), NOW)
    assert _held(decisions, NOW + 5 * SECOND)[0] == _holder()
    assert _held(decisions, NOW + 6 * SECOND)[0] == b""
    assert (len(decisions._tree), decisions._blocks) == (0, 0)


def test_a_clock_that_is_ahead_does_not_make_it_live_longer() -> None:
    """A record that claims an hour ends after a minute here; one that has expired is not taken."""
    decisions = Decisions(ScorerSettings())
    decisions.put(_record("hour", seconds=3600), NOW)
    decisions.put(_record("late", seconds=0), NOW)
    assert list(decisions.open) == ["hour"]
    decisions.expire(NOW + 60 * SECOND)
    assert decisions.open == {}


def test_a_request_that_is_decided_again_goes_to_the_new_pod() -> None:
    """A second decision under the same id replaces the first, also when the first one's time would end."""
    decisions = Decisions(ScorerSettings())
    decisions.put(_record(seconds=1), NOW)
    decisions.put(_record(pod="b", seconds=5), NOW)
    assert _held(decisions, NOW + 2 * SECOND)[0] == _holder("b")


def test_records_of_the_log() -> None:
    """Decisions act, outcomes and what cannot be read do not, and the latter is counted."""
    decisions = Decisions(ScorerSettings())
    assert decisions.apply(encode(_record("outcome", kind=OUTCOME)), NOW) is not None
    assert decisions.apply(None, NOW) is None
    assert decisions.apply(b"nonsense", NOW) is None
    assert (list(decisions.open), decisions.rejected) == ([], 1)
    decisions.apply(encode(_record()), NOW)
    assert list(decisions.open) == ["r"]


@pytest.mark.parametrize(("bound", "most"), [("MOST_DECISIONS", 3), ("MOST_BLOCKS", 4)])
def test_the_oldest_go_when_there_are_too_many(bound: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions and their blocks stay within bounds; what is gone holds nothing."""
    monkeypatch.setattr(f"kvatlas.scorer.scoring.decisions.{bound}", most)
    decisions = Decisions(ScorerSettings())
    for number in range(10):
        keys = b"".join(bytes([number]) * 15 + bytes([block]) for block in range(2))
        decisions.put(DecisionRecord(request_id=str(number), pod="a", keys=keys, expires_ns=NOW + SECOND), NOW)
    assert list(decisions.open) == (["7", "8", "9"] if bound == "MOST_DECISIONS" else ["8", "9"])
    assert len(decisions._tree) == len(decisions.open)


@pytest.mark.parametrize("pod", [None, PodRecord(pod="a", writer="streams", state=GONE)])
def test_a_pod_that_is_not_there_cannot_be_decided_for(pod: PodRecord | None) -> None:
    """Unknown pods and pods that are gone are refused, and nothing is published."""
    sent: list[DecisionRecord] = []
    decisions = Decisions(ScorerSettings(), sent.append)
    with pytest.raises(UnknownPodError, match="'a'"):
        decisions.decide(
            "r",
            pod,
            pod="a",
            prompt=Remembered("m", "", b"".join(KEYS), 16, {}, {}, {}),
            policy="",
            ttl_ms=0,
            now_ns=NOW,
        )
    assert (sent, decisions.open) == ([], {})


_STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from("ab"), st.integers(0, 10), st.integers(0, 60), st.integers(0, 20)),
    max_size=30,
)


@given(_STEPS)
def test_the_overlay_is_what_the_open_decisions_say(steps: list[tuple[int, str, int, int, int]]) -> None:
    """After any decisions and any passage of time, blocks are held by exactly the pods of decisions still open."""
    decisions = Decisions(ScorerSettings())
    model: dict[str, tuple[str, int, int]] = {}
    now = NOW
    for number, pod, blocks, seconds, later in steps:
        expires = now + seconds * SECOND
        decisions.put(
            DecisionRecord(
                request_id=str(number), pod=pod, pod_epoch=7, keys=b"".join(KEYS[:blocks]), expires_ns=expires
            ),
            now,
        )
        if blocks and seconds:
            model[str(number)] = (pod, blocks, min(expires, now + 60 * SECOND))
        now += later * SECOND
        model = {name: entry for name, entry in model.items() if entry[2] > now}
        found = [{value[at : at + 24] for at in range(0, len(value), 24)} for value in _held(decisions, now) if value]
        expected = [{_holder(p) for p, count, _ in model.values() if count > at} for at in range(len(KEYS))]
        assert found == [holders for holders in expected if holders]
