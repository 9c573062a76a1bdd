"""What clients say stays with the engine: no prompt, body or session reaches a log, a record, a refusal or a metric."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from kvatlas.bridge.model.records import DecisionRecord, encode
from kvatlas.scorer.gateway.decider import PickerDecider
from kvatlas.scorer.gateway.discovery import parse_endpoint
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.outcome import ResponseWatch
from kvatlas.scorer.gateway.prefixes import CorePrefixes
from kvatlas.scorer.gateway.recorder import Recorder
from kvatlas.scorer.gateway.state import PickerState
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from tests.scorer.rig import PARTITIONS, Index, Rig

SECRET = "Xyzzy-plugh"
FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate", "/v1/x"]

SAID = st.sampled_from([SECRET, f"{SECRET} {SECRET}", f"{{% {SECRET} %}}"])
ANY = st.recursive(
    st.one_of(SAID, st.none(), st.booleans(), st.integers(-5, 2**40)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(SAID, st.just("type")), inner)),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.one_of(st.sampled_from(["user", "system", "assistant", "tool"]), SAID),
        "content": st.one_of(SAID, ANY),
    },
    optional={"tool_calls": ANY, "name": ANY, "tool_call_id": ANY},
)
BODY = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "m", "m", "other"])},
    optional={
        **dict.fromkeys(("prompt", "input"), st.one_of(SAID, ANY)),
        "messages": st.one_of(st.lists(MESSAGE, max_size=3), ANY),
        **dict.fromkeys(("system", "instructions", "tools", "tool_choice", "reasoning_effort", "session_id"), ANY),
        **dict.fromkeys(("cache_salt", "lora", "chat_template_kwargs", "features", "token_ids", "stream"), ANY),
        "chat_template": SAID,
    },
)
DATA = st.one_of(
    BODY.map(json.dumps).map(str.encode),
    BODY.map(json.dumps).map(lambda text: text[:-1].encode()),  # cut short
    SAID.map(lambda text: b"\xff" + text.encode()),
)


class Spy(logging.Handler):
    """Takes every line of every logger, at every level, with its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class World:
    """A picker over a real index and tokenizer; what it publishes is kept."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.rig = Rig()
        self.pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
        self.published: list[DecisionRecord] = []
        scorer: Any = SimpleNamespace(core=self.rig.core, pods=self.rig.pods, publish=self.published.append)
        picker = PickerSettings(name="p", deadline_ms=60_000.0, unreadable="refuse", peer_tokens=16)
        self.state = PickerState(picker, time.monotonic)
        self.state.use(parse_endpoint("10.0.0.1:8000,pod=a,model=m") + parse_endpoint("10.0.0.2:8000,pod=b,model=m"))
        self.recorder = Recorder(picker, scorer)
        self.prefixes = CorePrefixes(self.rig.core, self.pool)
        self.decider = PickerDecider(
            picker, self.state, self.prefixes, report=self.recorder.decided, outcome=self.watch
        )

    def watch(self, request_id: str) -> ResponseWatch:
        return ResponseWatch(request_id, self.state, self.recorder.served, clock=time.monotonic)

    async def open(self) -> None:
        await self.rig.worker(Index("w", self.rig.table, set(range(PARTITIONS))))
        self.rig.pod("a", 4)

    async def close(self) -> None:
        await self.rig.stack.aclose()
        await self.rig.router.close()
        self.pool.close()

    def serve(self, path: str, data: bytes, answer: bytes) -> Decision:
        """Decide a request and show its answer; returns the decision."""

        async def work() -> Decision:
            headers = {":path": f"{path}?key={SECRET}", "x-session-id": SECRET, "authorization": SECRET}
            decision = await self.decider.decide(Incoming(headers, data, None, "r"))
            watch = self.decider.exchange("r")
            watch.headers(200, "application/json", "10.0.0.1:8000")
            watch.chunk(answer)
            watch.ended(complete=True)
            return decision

        return self.runner.run(work())


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    with made.runner:
        made.runner.run(made.open())
        yield made
        made.runner.run(made.close())


@pytest.fixture(scope="module")
def spy() -> Iterator[Spy]:
    made, root = Spy(), logging.getLogger()
    before = root.level
    root.addHandler(made)
    root.setLevel(logging.DEBUG)
    yield made
    root.removeHandler(made)
    root.setLevel(before)


def assert_unsaid(world: World, spy: Spy, decision: Decision) -> None:
    told = [*spy.lines, generate_latest().decode(), *(encode(record).decode("latin-1") for record in world.published)]
    if isinstance(decision, Refusal):
        told += [decision.text, decision.reason]
    assert not [line for line in told if SECRET in line]
    spy.lines.clear()
    world.published.clear()


@given(path=st.sampled_from(PATHS), data=DATA)
def test_no_body_is_repeated_anywhere(world: World, spy: Spy, path: str, data: bytes) -> None:
    """Whatever a body is: good, refused by our reading, by the template, or no JSON."""
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}}
    answer = json.dumps({"choices": [{"text": SECRET}], "usage": usage}).encode()
    assert_unsaid(world, spy, world.serve(path, data, answer))


@pytest.mark.parametrize("broken", ["_pool", "_core"])
def test_no_fault_of_ours_repeats_one(world: World, spy: Spy, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception's text may hold what was worked on; where it happened says enough."""

    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    class Broken:
        __getattr__ = fail

    data = json.dumps({"model": "m", "prompt": SECRET}).encode()
    monkeypatch.setattr(world.prefixes, broken, Broken())
    assert_unsaid(world, spy, world.serve("/v1/completions", data, b"{}"))
    monkeypatch.undo()
    monkeypatch.setattr(world.state, "decided", fail)
    decision = world.serve("/v1/completions", data, b"{}")
    assert decision == Destination(())
    assert any("ValueError < test_secrets.py:" in line and "decider.py:" in line for line in spy.lines)
    assert_unsaid(world, spy, decision)
