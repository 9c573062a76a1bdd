"""Prompts under overload: not scored, which the picker takes as a reason to decide by load alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.scorer.gateway.prefixes import CorePrefixes


async def test_where_there_is_more_than_can_be_scored_a_prompt_is_not_looked_at() -> None:
    """The refusal comes before the body is taken apart."""
    core: Any = SimpleNamespace(admission=Admission(0, "prompts"))
    nobody: Any = None
    with pytest.raises(OverloadedError, match="0 prompts"):
        await CorePrefixes(core, nobody).of("completions", {"no": "prompt"}, math.inf)
