"""Prompts that are not scored, which the picker takes as a reason to decide by load alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.model.records import PodRecord, encode
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.scorer.errors import InputError, NotReadyError
from kvatlas.scorer.gateway.prefixes import CorePrefixes
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig


async def test_where_there_is_more_than_can_be_scored_a_prompt_is_not_looked_at() -> None:
    """The refusal comes before the body is taken apart."""
    core: Any = SimpleNamespace(admission=Admission(0, "prompts"), stale=False)
    nobody: Any = None
    with pytest.raises(OverloadedError, match="0 prompts"):
        await CorePrefixes(core, nobody).of("completions", {"no": "prompt"}, math.inf)


async def test_an_index_that_nobody_keeps_up_to_date_is_not_asked() -> None:
    """Workers that announce themselves no more, as while Kafka is away, still answer: with what was so before."""
    pool = TokenizerPool(TokenizerSettings())
    rig = Rig(pool=pool)
    async with rig.stack:
        worker = Index("w", rig.table, set(range(PARTITIONS)))
        await rig.worker(worker)
        rig.pod("a", 4)
        prefixes = CorePrefixes(rig.core, pool)
        body = {"model": "m", "prompt": TOKENS}
        found = await prefixes.of("completions", body, math.inf)
        assert found.held["a"].tokens == 64
        announced = rig.workers.records["w"]
        rig.workers.apply(b"w", encode(msgspec.structs.replace(announced, expires_ns=1)))
        asked = worker.asked
        with pytest.raises(NotReadyError, match="no worker has announced itself lately"):
            await prefixes.of("completions", body, math.inf)
        assert worker.asked == asked
        rig.workers.apply(b"w", encode(announced))
        assert (await prefixes.of("completions", body, math.inf)).held == found.held
        for field in ("model", "lora"):  # they are kept, and told to others
            with pytest.raises(InputError, match=field):
                await prefixes.of("completions", {**body, field: "m" * 100_000}, math.inf)


def test_a_name_of_clients_is_turned_into_the_engines_own() -> None:
    """Also where nothing can be scored; an adapter of several models stays what it is."""
    rig = Rig(aliases=["nick=m"])
    nobody: Any = None
    prefixes = CorePrefixes(rig.core, nobody)
    for pod, model in (("a", "m"), ("b", "n")):
        adapters = ["both", f"of-{model}"]
        record = PodRecord(pod=pod, writer="streams", model=model, adapters=adapters)
        rig.pods.apply(f"streams|{pod}".encode(), encode(record))
    wanted = {"nick": "m", "m": "m", "of-n": "n", "both": "both", "unheard": "unheard", "": ""}
    assert {name: prefixes.named(name) for name in wanted} == wanted
    rig.core.intake.close()
