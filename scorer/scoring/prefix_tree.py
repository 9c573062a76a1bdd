"""Prefix tree of block keys: which pods open decisions name along a prompt, in steps per fork, not per block. Pure.

A key names all blocks before it, so decisions that share a block share everything up to there. An edge is the packed
keys of a stretch that the same decisions have in common; walking, adding and removing compare whole edges in C. A
prompt of 19,000 blocks that was decided before is one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvatlas.bridge.model.block_key import KEY_BYTES


class Span(NamedTuple):
    """A stretch of a prompt, from where the one before ended.

    Attributes:
        blocks: its length.
        holders: packed holders that decisions name for each of its blocks, one behind the other, sorted.
    """

    blocks: int
    holders: bytes


class _Node:
    """A stretch of keys that all decisions counted here have; ``counts`` is holder -> decisions."""

    __slots__ = ("children", "counts", "edge", "joined")

    def __init__(self, edge: bytes, counts: dict[bytes, int]) -> None:
        self.edge = edge
        self.counts = counts
        self.children: dict[bytes, _Node] = {}
        self.joined: bytes | None = None

    def holders(self) -> bytes:
        if self.joined is None:
            self.joined = b"".join(sorted(self.counts))
        return self.joined

    def count(self, holder: bytes, change: int) -> None:
        left = self.counts.get(holder, 0) + change
        if left:
            self.counts[holder] = left
        else:
            del self.counts[holder]
        self.joined = None

    def split(self, at: int) -> None:
        """Make a node of its own of what is behind ``at`` bytes."""
        lower = _Node(self.edge[at:], dict(self.counts))
        lower.children = self.children
        self.edge = self.edge[:at]
        self.children = {lower.edge[:KEY_BYTES]: lower}

    def merge(self) -> None:
        """Take the one child in where the same decisions go on in it: forks that are no more leave no nodes."""
        if len(self.children) == 1:
            (child,) = self.children.values()
            if child.counts == self.counts:
                self.edge += child.edge
                self.children = child.children


class PrefixTree:
    """Decisions' prompts with their holders, shared as far as they are the same."""

    def __init__(self) -> None:
        self._roots: dict[bytes, _Node] = {}

    def __bool__(self) -> bool:
        return bool(self._roots)

    def __len__(self) -> int:
        """Return the number of stretches."""
        waiting = list(self._roots.values())
        for node in waiting:
            waiting.extend(node.children.values())
        return len(waiting)

    def add(self, keys: bytes, holder: bytes) -> None:
        """Let a holder have a prompt's blocks, once more."""
        at, children = 0, self._roots
        while at < len(keys):
            first = keys[at : at + KEY_BYTES]
            node = children.get(first)
            if node is None:
                children[first] = _Node(keys[at:], {holder: 1})
                return
            common = _common(node.edge, keys, at)
            if common < len(node.edge):
                node.split(common)
            node.count(holder, 1)
            at += common
            children = node.children

    def remove(self, keys: bytes, holder: bytes) -> None:
        """Take back what :meth:`add` was told with the same arguments."""
        at, children = 0, self._roots
        path: list[_Node] = []
        while at < len(keys):
            first = keys[at : at + KEY_BYTES]
            node = children[first]
            node.count(holder, -1)
            if not node.counts:  # nobody else came this far, so nobody went on from here
                del children[first]
                break
            path.append(node)
            at += len(node.edge)
            children = node.children
        for node in reversed(path):
            node.merge()

    def along(self, keys: bytes) -> Iterator[Span]:
        """Yield the stretches of a prompt that decisions name, up to the first block that none does."""
        at, children = 0, self._roots
        while (node := children.get(keys[at : at + KEY_BYTES])) is not None:
            common = _common(node.edge, keys, at)
            yield Span(common // KEY_BYTES, node.holders())
            if common < len(node.edge):
                return
            at += common
            children = node.children


def _common(edge: bytes, keys: bytes, at: int) -> int:
    """Return how many bytes of whole keys an edge shares with ``keys`` from ``at`` on; the first key is the same."""
    if keys.startswith(edge, at):
        return len(edge)
    same, differs = 1, min(len(edge), len(keys) - at) // KEY_BYTES + 1
    while differs - same > 1:
        middle = (same + differs) // 2
        if keys.startswith(edge[same * KEY_BYTES : middle * KEY_BYTES], at + same * KEY_BYTES):
            same = middle
        else:
            differs = middle
    return same * KEY_BYTES
