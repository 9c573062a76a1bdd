"""Resolve and index against a plain model of what pods hold, under everything that a stream can do to them."""

from __future__ import annotations

from itertools import product

import pytest
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvatlas.bridge.model.events import Tier

C = 16
DEPTH = 4
MEDIA = {"GPU": Tier.GPU, "CPU": Tier.CPU, "FS": Tier.DISK}
PODS = ("a", "b")

paths = st.lists(st.integers(0, 1), min_size=1, max_size=DEPTH).map(tuple)
media = st.sampled_from(sorted(MEDIA))
pods = st.sampled_from(PODS)
groups = st.sampled_from((0, 1))


class Pod:
    """What one pod holds: (group, path) -> medium -> [announcements, suspect]; and which of it can be named."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        self.sizes = sizes
        self.held: dict[tuple[int, tuple[int, ...]], dict[str, list[int]]] = {}
        self.named: set[tuple[int, tuple[int, ...]]] = set()

    def store(self, group: int, path: tuple[int, ...], start: int, medium: str) -> None:
        for end in range(start + 1, len(path) + 1):
            at = (group, path[:end])
            parent = (group, path[: end - 1])
            known = at in self.held and at in self.named
            if known or end == 1 or (parent in self.held and parent in self.named):
                self.named.add(at)
            self.announce(at, medium)
            if at in self.named:
                self.name_children(at)

    def announce(self, at: tuple[int, tuple[int, ...]], medium: str) -> None:
        media = self.held.setdefault(at, {})
        if medium in media and not media[medium][1]:
            media[medium][0] += 1
        else:
            media[medium] = [1, 0]

    def name_children(self, at: tuple[int, tuple[int, ...]]) -> None:
        group, path = at
        for label in (0, 1):
            child = (group, (*path, label))
            if child in self.held and child not in self.named:
                self.named.add(child)
                self.name_children(child)

    def remove(self, group: int, path: tuple[int, ...], medium: str) -> None:
        at = (group, path)
        media = self.held.get(at, {})
        if medium not in media:
            return
        media[medium][0] -= 1
        if media[medium][1] or not media[medium][0]:
            del media[medium]
        if not media:
            del self.held[at]
            self.named.discard(at)

    def gap(self) -> None:
        for media in self.held.values():
            for entry in media.values():
                entry[1] = 1

    def end(self) -> None:
        self.held.clear()
        self.named.clear()

    def blocks(self) -> dict[tuple[int, ...], set[tuple[int, int, bool]]]:
        """Return tokens of a canonical prefix -> (tier, group, suspect) under which the pod holds its last block."""
        found: dict[tuple[int, ...], set[tuple[int, int, bool]]] = {}
        for (group, path), media in self.held.items():
            if (group, path) not in self.named:
                continue
            size = self.sizes[group]
            tokens = tokens_of(path, size)
            first = (len(tokens) - size) // C
            for number in range(first, len(tokens) // C):
                for medium in media:
                    members = self.members(group, path, number)
                    entries = [self.held.get((group, member), {}).get(medium) for member in members]
                    if all(entries):
                        suspect = any(entry[1] for entry in entries if entry)
                        prefix = tokens[: (number + 1) * C]
                        found.setdefault(prefix, set()).add((int(MEDIA[medium]), group, suspect))
        return found

    def members(self, group: int, path: tuple[int, ...], number: int) -> list[tuple[int, ...]]:
        size = self.sizes[group]
        return [
            path[:end]
            for end in range(1, len(path) + 1)
            if (end - 1) * size < (number + 1) * C and end * size > number * C
        ]


def tokens_of(path: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(token for label in path for token in [label + 1] * size)


def machine(world_class, make, sizes):
    """Return a state machine for engine block sizes per group."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.world = world_class(block_size_tokens=C, clears="all", announcements="copies")
            self.model = {pod: Pod(sizes) for pod in PODS}
            self.late: list[tuple[int, bytes]] = []
            self.universe = {
                tokens[:end]
                for size in sizes
                for path in product((0, 1), repeat=DEPTH)
                for tokens in [tokens_of(path, size)]
                for end in range(C, len(tokens) + 1, C)
            }
            self.names = {tokens: self.world.keys(tokens)[-1] for tokens in self.universe}

        def key(self, pod: str, group: int, path: tuple[int, ...]) -> int:
            return xxhash.xxh3_64_intdigest(repr((pod, sizes[group], path)).encode())

        def send(self, pod: str, *events: object) -> None:
            w = self.world
            w.send(pod, *events, deliver=False)
            self.late += w.resolve(w.log[-1:])

        @rule(pod=pods, group=groups, path=paths, medium=media, start=st.integers(0, DEPTH - 1))
        def store(self, pod, group, path, medium, start) -> None:
            start = min(start, len(path) - 1)
            if sizes[group] % C and start and (group, path[:start]) not in self.model[pod].held:
                start = 0  # orphans of partial blocks have their own tests
            self.model[pod].store(group, path, start, medium)
            hashes = [self.key(pod, group, path[:end]) for end in range(start + 1, len(path) + 1)]
            parent = self.key(pod, group, path[:start]) if start else None
            tokens = tokens_of(path[start:], sizes[group])
            told = {"medium": medium, "group_idx": group, "extra_keys": [None] * len(hashes)}
            self.send(pod, make.stored(hashes, tokens, sizes[group], parent, **told))

        @rule(pod=pods, group=groups, path=paths, medium=media)
        def offload(self, pod, group, path, medium) -> None:
            if (group, path) in self.model[pod].held:
                self.model[pod].announce((group, path), medium)
            hashes = [self.key(pod, group, path)]
            self.send(pod, make.stored(hashes, [], 0, medium=medium, group_idx=group))

        @rule(pod=pods, group=groups, chosen=st.lists(paths, min_size=1, max_size=3), medium=media)
        def remove(self, pod, group, chosen, medium) -> None:
            for path in chosen:
                self.model[pod].remove(group, path, medium)
            hashes = [self.key(pod, group, path) for path in chosen]
            self.send(pod, make.removed(hashes, medium, group_idx=group))

        @rule(pod=pods, data=st.data())
        def remove_held(self, pod, data) -> None:
            held = sorted((*at, medium) for at, media in self.model[pod].held.items() for medium in media)
            if held:
                group, path, medium = data.draw(st.sampled_from(held))
                self.remove(pod, group, [path], medium)

        @rule(pod=pods)
        def clear(self, pod) -> None:
            self.model[pod].end()
            self.send(pod, make.cleared)

        @rule(pod=pods, kind=st.sampled_from(["restart", "gone", "start"]))
        def restart(self, pod, kind) -> None:
            self.model[pod].end()
            self.world.control(pod, kind, deliver=False)
            self.late += self.world.resolve(self.world.log[-1:])

        @rule(pod=pods)
        def gap(self, pod) -> None:
            next_sequence = self.world._next.get(pod, 0)
            self.model[pod].gap()
            self.world.control(pod, "gap", lost=(next_sequence, next_sequence + 2), deliver=False)
            self.late += self.world.resolve(self.world.log[-1:])

        @rule(pod=pods)
        def hole(self, pod) -> None:
            if pod in self.world.pods and self.world.pods[pod].last_sequence >= 0:
                self.world._next[pod] += 1
                self.model[pod].gap()
                self.send(pod)

        @precondition(lambda self: self.world.log)
        @rule(back=st.integers(1, 12))
        def repeat_messages(self, back) -> None:
            assert self.world.resolve(self.world.log[-back:]) == []

        @precondition(lambda self: self.world.updates)
        @rule(back=st.integers(1, 12), count=st.integers(1, 6))
        def repeat_updates(self, back, count) -> None:
            self.world.apply(self.world.updates[-back:][:count])

        @rule()
        def deliver(self) -> None:
            self.world.apply(self.late)
            self.world.updates += self.late
            self.late = []

        @invariant()
        def the_index_is_the_model(self) -> None:
            self.deliver()
            w = self.world
            assert not w.dead
            for pod, model in self.model.items():
                expected = model.blocks()
                record = w.pods.get(pod)
                for tokens, name in self.names.items():
                    found = {
                        (tier, group, w_epoch < record.suspect_before)
                        for ref, group, tier, _, _, w_epoch in w.holders(name)
                        if record is not None and ref == self.refs[pod]
                    }
                    assert found == expected.get(tokens, set()), (pod, tokens)
                if record is not None:
                    waiting = sum(at not in model.named for at in model.held)
                    assert w.state(pod).orphans == waiting

        @property
        def refs(self) -> dict[str, int]:
            return {pod: xxhash.xxh3_64_intdigest(pod.encode()) for pod in PODS}

    return Machine


@pytest.mark.parametrize("sizes", [(16, 32), (8, 16), (32, 8), (4, 16), (24, 12)])
def test_the_index_is_what_the_pods_hold(world, make, sizes):
    """Stores, offloads, removals, clears, restarts, gaps, holes, orphans and repetition leave what the model holds."""
    run_state_machine_as_test(
        machine(world, make, sizes),
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
