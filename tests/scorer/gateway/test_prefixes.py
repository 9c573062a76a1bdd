"""Prompts that are not scored, which the picker takes as a reason to decide by load alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.model.records import PodRecord, encode
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.scorer.errors import InputError, NotReadyError, TooLargeError
from kvatlas.scorer.gateway.body import read_body
from kvatlas.scorer.gateway.look import Looker
from kvatlas.scorer.gateway.prefixes import CorePrefixes
from kvatlas.scorer.picker.route import Incoming
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.requests import shape_of
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"


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


def _many(kind: str) -> bytes:
    """A body of very many JSON values, whose prompt is `TOKENS` where it is not they."""
    head = msgspec.json.encode({"model": "m", "session_id": "s", "prompt": TOKENS})[:-1]
    return {
        "lists": lambda: head + b',"tools":[' + b"[]," * 1_000_000 + b"[]]}",
        "keys": lambda: head + b"".join(b',"%x":1' % number for number in range(500_000)) + b"}",
        "prompts": lambda: b'{"model":"m","session_id":"s","prompt":[' + b'"a",' * 1_000_000 + b'"a"]}',
        "objects": lambda: b'{"model":"m","session_id":"s","prompt":[' + b"{}," * 1_000_000 + b"{}]}",
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "degraded"), [("lists", ""), ("keys", ""), ("prompts", "no-tokenizer"), ("objects", "unreadable")]
)
async def test_a_body_of_very_many_values_is_read_beside_the_loop(
    kind: str, degraded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is answered as any other, and costs the loop a part of what making its values would."""
    for limit in ("_READ_SECONDS", "_READ_CPU_SECONDS"):
        monkeypatch.setattr(f"kvatlas.scorer.api.intake.{limit}", 90.0)
    data = _many(kind)
    began = time.thread_time()
    msgspec.json.decode(data)
    making = time.thread_time() - began
    pool = TokenizerPool(TokenizerSettings())
    rig = Rig(pool=pool)
    async with rig.stack:
        await rig.worker(Index("w", rig.table, set(range(PARTITIONS))))
        rig.pod("a", 4)
        looker = Looker(CorePrefixes(rig.core, pool), 90.0)
        began = time.thread_time()
        known = await looker.look(Incoming({":path": "/v1/completions"}, data, None, "r"))
        spent = time.thread_time() - began
    assert known.degraded == degraded
    assert known.body is not None
    assert (known.body.model, known.body.session) == ("m", "s")
    assert spent < making


async def test_a_prompt_above_the_longest_is_not_scored() -> None:
    """Load alone decides, as for everything that cannot be looked up."""
    pool = TokenizerPool(TokenizerSettings())
    rig = Rig(pool=pool, max_tokens=len(TOKENS) - 1)
    async with rig.stack:
        with pytest.raises(TooLargeError, match="max_tokens"):
            await CorePrefixes(rig.core, pool).of("completions", {"model": "m", "prompt": TOKENS}, math.inf)


def test_long_texts_are_decoded_at_once() -> None:
    """A prompt of megabytes is one value."""
    body = read_body(msgspec.json.encode({"model": "m", "prompt": "a, b" * 1_000_000}))
    assert body is not None
    assert body.document is not None


TEXT = "The router keeps the prefix. " * 12
CHAT = [{"role": "user", "content": TEXT}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": TEXT},
    "/v1/messages": {"messages": CHAT, "max_tokens": 9},
    "/inference/v1/generate": {"token_ids": TOKENS, "sampling_params": {}},
    "/v1/chat/completions/render": {"messages": CHAT},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_api_has_its_prompt_scored(path: str, stream: bool) -> None:
    """Whoever holds the first block is found by text, chat, token ids and Anthropic's messages alike."""
    pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
    rig = Rig(pool=pool)
    async with rig.stack:
        await rig.worker(Index("w", rig.table, set(range(PARTITIONS))))
        prefixes = CorePrefixes(rig.core, pool)
        shape = shape_of(path)
        assert shape is not None
        body = {"model": "m", "stream": stream, **BODIES[path]}
        rig.pod("a", 0)
        cold = await prefixes.of(shape, body, math.inf)
        assert (cold.model, dict(cold.held)) == ("m", {})
        keys = cold.remembered.keys
        assert 16 < len(keys) <= cold.tokens
        rig.hold("a", [keys[at : at + 16] for at in range(0, len(keys), 16)])
        found = await prefixes.of(shape, body, math.inf)
        assert found.tokens == cold.tokens
        assert found.held["a"].tokens == len(keys)  # 16 bytes a key, 16 tokens a block
        await rig.router.close()
    pool.close()
