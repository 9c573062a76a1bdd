"""Newest decisions joined with what came of them, and the prefixes that they share. Pure.

A decision, its outcome and the engine's own word are records of their own on ``kv-decisions``; they meet here by the
request's id. The prefix tree is made from the block keys in the decisions: equal leading keys are equal leading tokens.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import records
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.bridge.model.sessions import SESSIONS

#: Most nodes of a prefix tree.
_NODES: Final = 400
_SERVED: Final = (
    "endpoint",
    "status",
    "prompt_tokens",
    "cached_tokens",
    "first_token_ms",
    "outcome",
    "cause",
    "regret_tokens",
)


class Decided(msgspec.Struct):
    """One request: the decision, and what came of it as far as it is known.

    Attributes:
        number: grows with every change of any request; a reader asks for what came after the last one it has.
        decision: where it went.
        outcome: what the events showed later.
        served: what the engine said on the way back.
    """

    number: int
    decision: DecisionRecord
    outcome: DecisionRecord | None = None
    served: DecisionRecord | None = None

    def row(self) -> dict[str, Any]:
        """Return it as the page shows it."""
        decision, served = self.decision, self.served
        return {
            "number": self.number,
            "request_id": decision.request_id,
            "decided_ms": decision.decided_ns / 1e6,
            "model": decision.model,
            "pod": decision.pod,
            "endpoint": decision.endpoint,
            "policy": decision.policy,
            "blocks": len(decision.keys) // KEY_BYTES,
            "block_size_tokens": decision.block_size_tokens,
            "predicted_tokens": decision.predicted_tokens or decision.predicted_blocks * decision.block_size_tokens,
            "scores": {pod: list(score) for pod, score in decision.scores.items()},
            "degraded": decision.degraded,
            "outcome": self.outcome.outcome if self.outcome is not None else "",
            "served": None if served is None else {name: getattr(served, name) for name in _SERVED},
        }


class DecisionLog:
    """The newest requests, bounded.

    Attributes:
        unreadable: records that could not be read.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._number = 0
        self._requests: OrderedDict[str, Decided] = OrderedDict()
        self.unreadable = 0

    def apply(self, value: bytes | None) -> DecisionRecord | None:
        """Take one ``kv-decisions`` record and return it; one that cannot be read is counted."""
        if not value:
            return None
        try:
            record = records.decode(DecisionRecord, value)
        except WireError:
            self.unreadable += 1
            return None
        self._join(record)
        return record

    def _join(self, record: DecisionRecord) -> None:
        known = self._requests.get(record.request_id)
        self._number += 1
        if record.kind == "decision":
            self._requests[record.request_id] = Decided(self._number, record)
        elif known is not None and record.kind != SESSIONS:
            setattr(known, "served" if record.kind == "served" else "outcome", record)
            known.number = self._number
        else:
            return
        self._requests.move_to_end(record.request_id)
        while len(self._requests) > self._most:
            self._requests.popitem(last=False)

    def after(self, number: int, most: int, tenant: str | None = None) -> list[Decided]:
        """Return the newest requests that changed after a number, oldest first; with a tenant its own alone."""
        found: list[Decided] = []
        for request in reversed(self._requests.values()):
            if request.number <= number or len(found) == most:
                break
            if tenant is None or request.decision.tenant == tenant:
                found.append(request)
        return found[::-1]

    def since(self, moment_ns: int, tenant: str | None = None) -> Iterable[Decided]:
        """Yield the requests decided since a moment; with a tenant its own alone."""
        return (
            request
            for request in self._requests.values()
            if request.decision.decided_ns >= moment_ns and (tenant is None or request.decision.tenant == tenant)
        )


class Node(msgspec.Struct):
    """Blocks that the same requests share, as one stretch of the tree.

    Attributes:
        key: block key of the last block, hexadecimal.
        first: number of the first block.
        blocks: how many.
        asked: requests that have this stretch.
        pods: pod -> requests of these that went there.
        saved_tokens: prompt tokens of the stretch that the chosen pods were predicted to have, over all its requests.
        children: stretches behind it, most asked first.
    """

    key: str
    first: int
    blocks: int
    asked: int
    pods: dict[str, int]
    saved_tokens: int
    children: list[Node] = []


def prefixes(requests: Iterable[Decided], model: str, *, least: int = 2) -> tuple[list[Node], int]:
    """Return the tree of prefixes that at least ``least`` requests share, and the requests looked at.

    Args:
        requests: newest decisions.
        model: only of this model; empty for all.
        least: stretches asked for less often are left out.
    """
    looked = [
        request.decision
        for request in requests
        if request.decision.keys and (not model or request.decision.model == model)
    ]
    tree: list[Node] = []
    order = itertools.count()
    waiting: list[tuple[int, int, int, list[DecisionRecord], list[Node]]] = []

    def split(group: list[DecisionRecord], at: int, siblings: list[Node]) -> None:
        for part in _groups(group, at):
            if len(part) >= least:
                heapq.heappush(waiting, (-len(part), next(order), at, part, siblings))

    split(looked, 0, tree)
    for _ in range(_NODES):  # most asked first, so that what is left out was asked for least
        if not waiting:
            break
        _, _, at, group, siblings = heapq.heappop(waiting)
        node, end = _node(group, at)
        siblings.append(node)
        split(group, end, node.children)
    return tree, len(looked)


def _groups(requests: list[DecisionRecord], at: int) -> Iterable[list[DecisionRecord]]:
    """Return the requests by their block at a position, without those that end before it."""
    groups: dict[bytes, list[DecisionRecord]] = {}
    for request in requests:
        key = request.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]
        if key:
            groups.setdefault(key, []).append(request)
    return groups.values()


def _node(group: list[DecisionRecord], at: int) -> tuple[Node, int]:
    """Return the stretch that a group shares from a position on, and where it ends."""
    end = _shared(group, at)
    pods = Counter(request.pod for request in group)
    node = Node(
        key=group[0].keys[(end - 1) * KEY_BYTES : end * KEY_BYTES].hex(),
        first=at,
        blocks=end - at,
        asked=len(group),
        pods=dict(pods.most_common()),
        saved_tokens=sum(
            max(0, min(request.predicted_blocks, end) - at) * request.block_size_tokens for request in group
        ),
    )
    return node, end


def _shared(group: list[DecisionRecord], at: int) -> int:
    """Return how many leading blocks all of a group share; more than ``at``."""
    first = group[0].keys
    end = min(len(request.keys) for request in group) // KEY_BYTES
    low, high = at + 1, end
    while low < high:  # equal prefixes are equal bytes, so the end is found by halving
        middle = (low + high + 1) // 2
        if all(request.keys[: middle * KEY_BYTES] == first[: middle * KEY_BYTES] for request in group):
            low = middle
        else:
            high = middle - 1
    return low
