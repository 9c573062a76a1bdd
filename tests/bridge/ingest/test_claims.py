"""Rules of pods and endpoints: rename, conflict and hand-over, case by case."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.ingest.claims import RENAME_AFTER, Heard, Ruling, Strangers, rule

_CASES: Final = {
    # a name on an endpoint that has none yet
    "first message of a pod that nobody has": (Heard("a"), Ruling.TAKE),
    "first message of another bridge's pod": (Heard("a", owned=False), Ruling.WAIT),
    "one engine listed under two addresses": (Heard("a", held=True), Ruling.CONFLICT),
    "a pod that moved here from an address no longer listed": (Heard("a", held=True, leaving=True), Ruling.TAKE_OVER),
    "another bridge's pod that leaves an address of ours": (
        Heard("a", owned=False, held=True, leaving=True),
        Ruling.WAIT,
    ),
    # the endpoint's own pod
    "its own pod under another topic": (Heard("a", ours="a"), Ruling.FOLLOW),
    "its own pod in the moment when the partition goes": (Heard("a", ours="a", owned=False), Ruling.FOLLOW),
    "its own pod at a socket that engines connect to": (Heard("a", ours="a", bound=True), Ruling.FOLLOW),
    # rename
    "one message under another name": (Heard("b", ours="a", in_a_row=1), Ruling.FOREIGN),
    "the last one before the rename": (Heard("b", ours="a", in_a_row=RENAME_AFTER - 1), Ruling.FOREIGN),
    "a reply of another pod while the own one is heard": (Heard("b", ours="a", in_a_row=0), Ruling.FOREIGN),
    "another name in a row": (Heard("b", ours="a", in_a_row=RENAME_AFTER), Ruling.TAKE),
    "another name in a row at a socket that engines connect to": (
        Heard("b", ours="a", in_a_row=99, bound=True),
        Ruling.FOREIGN,
    ),
    "renamed to another bridge's pod": (Heard("b", ours="a", in_a_row=RENAME_AFTER, owned=False), Ruling.WAIT),
    "renamed to a pod that another endpoint has": (
        Heard("b", ours="a", in_a_row=RENAME_AFTER, held=True),
        Ruling.CONFLICT,
    ),
    "renamed to a pod that moved here": (
        Heard("b", ours="a", in_a_row=RENAME_AFTER, held=True, leaving=True),
        Ruling.TAKE_OVER,
    ),
    "another name, once, while it waits": (Heard("b", wanted="a", in_a_row=1), Ruling.FOREIGN),
    "another name in a row while it waits": (Heard("b", wanted="a", in_a_row=RENAME_AFTER), Ruling.TAKE),
    # conflict and hand-over: asked again for the pod that it waits for
    "still another endpoint's": (Heard("a", wanted="a", held=True), Ruling.WAIT),
    "the other endpoint is listed no longer": (Heard("a", wanted="a", held=True, leaving=True), Ruling.TAKE_OVER),
    "the other endpoint's pod changed its name or is gone": (Heard("a", wanted="a"), Ruling.TAKE),
    "partition lost to another bridge": (Heard("a", wanted="a", owned=False), Ruling.WAIT),
    "partition gained": (Heard("a", wanted="a", owned=True), Ruling.TAKE),
    "partition gained, and another endpoint was first": (Heard("a", wanted="a", held=True), Ruling.WAIT),
    "waits at a socket that engines connect to": (Heard("a", wanted="a", bound=True), Ruling.TAKE),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_case_is_ruled(name: str) -> None:
    """What becomes of a name that an endpoint heard."""
    heard, expected = _CASES[name]
    assert rule(heard) is expected


_names = st.sampled_from(["", "a", "b"])
_heard = st.builds(
    Heard,
    st.sampled_from(["a", "b"]),
    _names,
    _names,
    st.integers(0, 5),
    *[st.booleans() for _ in range(4)],
)


@given(_heard)
def test_a_pod_has_one_endpoint_and_one_bridge(heard: Heard) -> None:
    """None is taken that another bridge owns or another listed endpoint has, and none but the endpoint's by chance."""
    ruling = rule(heard)
    if ruling in (Ruling.TAKE, Ruling.TAKE_OVER):
        assert heard.owned
        assert not heard.held or heard.leaving
        assert (ruling is Ruling.TAKE_OVER) == heard.held
        assert not heard.ours or heard.in_a_row >= RENAME_AFTER
    if ruling in (Ruling.WAIT, Ruling.CONFLICT):
        assert not heard.owned or heard.held
    assert (ruling is Ruling.FOLLOW) == (heard.pod == heard.ours)


def test_names_count_in_a_row() -> None:
    """A third name in between begins anew."""
    strangers = Strangers()
    assert [strangers.named(pod) for pod in "bbcbbb"] == [1, 2, 1, 1, 2, 3]
