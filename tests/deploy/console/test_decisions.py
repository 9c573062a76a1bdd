"""Decisions joined with what came of them, and the prefixes that they share."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.records import DecisionRecord, encode
from kvatlas.deploy.console.decisions import DecisionLog, Node, prefixes


def decided(
    name: str, blocks: list[int], pod: str = "a", predicted: int = 0, kind: str = "decision", **more: object
) -> bytes:
    """Return a record; a block's key is its prefix, as keys of real prompts are."""
    keys = b"".join(hash(tuple(blocks[: at + 1])).to_bytes(16, "big", signed=True) for at in range(len(blocks)))
    fields = {"request_id": name, "pod": pod, "keys": keys, "predicted_blocks": predicted, "kind": kind, "model": "m"}
    return encode(DecisionRecord(**(fields | {"decided_ns": 1} | more)))


def test_a_request_is_told_again_when_its_outcome_comes() -> None:
    """A reader asks for what came after the last number it has, and gets what changed since."""
    log = DecisionLog(10)
    log.apply(decided("one", [1, 2]))
    log.apply(decided("two", [1, 3]))
    assert [request.row()["request_id"] for request in log.after(0, 100)] == ["one", "two"]
    last = log.after(0, 100)[-1].number
    log.apply(decided("one", [], kind="served", cached_tokens=16, first_token_ms=12.0))
    (changed,) = log.after(last, 100)
    assert changed.row()["served"]["cached_tokens"] == 16
    assert changed.row()["blocks"] == 2


def test_the_log_is_bounded_and_survives_garbage() -> None:
    """The oldest go; what cannot be read is counted; an outcome of a request that is not known is left out."""
    log = DecisionLog(2)
    for name in "abc":
        log.apply(decided(name, [1]))
    log.apply(b"\xc1")
    log.apply(None)
    log.apply(decided("unknown", [], kind="outcome", outcome="hit"))
    log.apply(decided("c", [], kind="sessions", sessions={"a" * 16: 1}))
    assert [request.decision.request_id for request in log.after(0, 100)] == ["b", "c"]
    assert log.after(0, 100)[-1].outcome is None
    assert log.unreadable == 1


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


@given(PROMPTS)
def test_the_tree_counts_what_counting_by_hand_gives(prompts: list[list[int]]) -> None:
    """Each prefix that at least two prompts share stands in the tree once, with as many askers as it has."""
    log = DecisionLog(1000)
    for number, prompt in enumerate(prompts):
        log.apply(decided(str(number), prompt, pod=f"p{number % 2}"))
    tree, looked = prefixes(log.since(0), "m")
    assert looked == len(prompts)
    counted = Counter(tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1))
    found: dict[int, list[int]] = {}

    def walk(nodes: list[Node]) -> None:
        for node in nodes:
            assert sum(node.pods.values()) == node.asked
            for depth in range(node.first, node.first + node.blocks):
                found.setdefault(depth, []).append(node.asked)
            walk(node.children)

    walk(tree)
    expected: dict[int, list[int]] = {}
    for prefix, asked in counted.items():
        if asked >= 2:
            expected.setdefault(len(prefix) - 1, []).append(asked)
    assert {depth: sorted(counts) for depth, counts in found.items()} == {
        depth: sorted(counts) for depth, counts in expected.items()
    }


def test_saved_tokens_are_what_was_predicted_inside_a_stretch() -> None:
    """A prediction longer than the stretch counts only inside it."""
    log = DecisionLog(10)
    log.apply(decided("one", [1, 2, 3], predicted=3))
    log.apply(decided("two", [1, 2, 4], predicted=1))
    ((node,), _) = prefixes(log.since(0), "")
    assert (node.blocks, node.asked, node.saved_tokens) == (2, 2, (2 + 1) * 16)


def test_a_bounded_tree_leaves_out_what_is_asked_for_least() -> None:
    """However many stretches one prefix branches into, a prefix that is asked for more often than these is there."""
    log = DecisionLog(10_000)
    for number in range(1_000):
        log.apply(decided(f"many-{number}", [1, 10 + number // 2]))
    for number in range(3):
        log.apply(decided(f"other-{number}", [2]))
    tree, _ = prefixes(log.since(0), "m")
    assert [node.asked for node in tree] == [1_000, 3]
    assert {node.asked for node in tree[0].children} == {2}
