"""Fixtures of the scorer's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.scorer.rig import Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    async with made.stack:
        yield made
        await made.router.close()
