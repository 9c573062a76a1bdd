"""Tests of the keeper of idle changelogs, on a table of memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.streams.errors import ChangelogError, DamagedError, FencedError
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import Role
from kvatlas.streams.upkeep.keeper import Keeper

SECOND = 1_000_000_000


class Table:
    """Notes commits; fails as told."""

    def __init__(self, **states: Any) -> None:
        self.states = dict(enumerate(states.values()))
        self.commits: list[tuple[int, int]] = []
        self.failure: Exception | None = None

    async def commit(self, state: Any, changes: ChangeSet) -> None:
        assert not changes.writes
        assert changes.receive_ns == 0
        assert state.lock.locked()
        if self.failure is not None:
            raise self.failure
        number = next(number for number, found in self.states.items() if found is state)
        self.commits.append((number, changes.source_offset))


def state(role: Role, written_s: int, foreign: set[bytes] | None = None) -> Any:
    return SimpleNamespace(
        role=role, meta=Meta(7, 0, written_s * SECOND), foreign=foreign or set(), lock=asyncio.Lock()
    )


def keeper_of(table: Any, *, sure: bool = True) -> Keeper:
    return Keeper([table], may_commit=lambda: sure, interval_seconds=0.12, clock=lambda: 1000 * SECOND)


async def test_only_idle_and_active_partitions_are_written() -> None:
    """Not one that was written lately or is no owner's; but one with entries to be written again."""
    table = Table(
        idle=state(Role.ACTIVE, 900),
        busy=state(Role.ACTIVE, 1000),
        copy=state(Role.STANDBY, 1),
        spoilt=state(Role.ACTIVE, 1000, {b"k"}),
    )
    assert await keeper_of(table).look() == 2
    assert table.commits == [(0, 7), (3, 7)]


async def test_nothing_is_written_while_the_group_may_have_others_write() -> None:
    """A worker that is not sure of its partitions leaves their changelogs alone."""
    table = Table(idle=state(Role.ACTIVE, 900))
    assert await keeper_of(table, sure=False).look() == 0
    assert table.commits == []


@pytest.mark.parametrize("failure", [FencedError("taken over"), DamagedError("cannot be read")])
async def test_what_cannot_be_tried_again_ends_it(failure: Exception) -> None:
    """The keeper ends by the error, and the worker with it; it does not say for ever that it tries again."""
    table = Table(idle=state(Role.ACTIVE, 900))
    table.failure = failure
    with pytest.raises(type(failure)):
        await asyncio.wait_for(keeper_of(table).run(), 90)


async def test_an_unanswered_write_is_tried_again() -> None:
    """Brokers that do not answer now may answer later."""
    table = Table(idle=state(Role.ACTIVE, 900))
    table.failure = ChangelogError("not acknowledged")
    running = asyncio.create_task(keeper_of(table).run())
    await asyncio.sleep(0.05)
    table.failure = None
    while not table.commits:
        await asyncio.sleep(0.01)
        assert not running.done()
    running.cancel()
