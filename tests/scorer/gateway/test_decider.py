"""The decision within its deadline: what is scored, what is missing, who is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import time
from collections.abc import Mapping
from typing import Any

import pytest

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.bridge.model.sessions import session_hash
from kvatlas.scorer.errors import NotReadyError, UnknownModelError
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.gateway.decider import Made, PickerDecider
from kvatlas.scorer.gateway.discovery import parse_endpoint
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.outcome import Joined, ResponseWatch
from kvatlas.scorer.gateway.prefixes import Prompt
from kvatlas.scorer.gateway.state import PickerState
from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.endpoints import Held
from kvatlas.scorer.picker.load import EngineReport
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal
from kvatlas.scorer.scoring.remembered import Remembered

PODS = ["10.0.0.1:8000,pod=a,model=m", "10.0.0.2:8000,pod=b,model=m", "10.0.0.3:8000,pod=c,model=m"]
BODY = {"model": "m", "prompt": "SECRET words of a prompt"}
NOTHING_KNOWN = Remembered("m", "", b"", 16, {}, {}, {})


class Stub:
    """Prefixes that answer as told."""

    def __init__(self, held: Mapping[str, Held] | None = None, tokens: int = 1_000) -> None:
        self.held = held or {}
        self.tokens = tokens
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.partial = False

    def named(self, model: str) -> str:
        return {"alias": "m"}.get(model, model)

    async def of(self, shape: str, body: Mapping[str, Any], deadline: float) -> Prompt:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return Prompt("m", self.tokens, self.held, self.partial, NOTHING_KNOWN)


class Desk:
    """A decider with its surroundings."""

    def __init__(self, stub: Stub | None, **settings: Any) -> None:
        self.settings = PickerSettings(name="p", **settings)
        self.now = 1_000.0  # stands still, so that no queue drains while a test computes
        self.state = PickerState(self.settings, lambda: self.now)
        self.state.use([one for text in PODS for one in parse_endpoint(text)])
        self.made: list[Made] = []
        self.joined: list[Joined] = []

        def record(made: Made) -> int:
            self.made.append(made)
            return 0

        self.decider = PickerDecider(
            self.settings, self.state, stub, report=record, outcome=self.watch, clock=lambda: self.now
        )

    def watch(self, request_id: str) -> ResponseWatch:
        return ResponseWatch(request_id, self.state, self.joined.append, clock=lambda: self.now)

    async def decide(
        self, body: Any = BODY, path: str = "/v1/completions", subset: frozenset[str] | None = None, **headers: str
    ) -> Decision:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.decider.decide(Incoming({":path": path, **named}, data, subset, "r1"))

    async def picked(self, **more: Any) -> str:
        decision = await self.decide(**more)
        assert isinstance(decision, Destination), decision
        return decision.addresses[0]


def degraded(cause: str) -> float:
    return metrics.DEGRADED.labels(cause)._value.get()


async def test_prompt_goes_to_its_holder_with_fallbacks() -> None:
    desk = Desk(Stub({"b": Held(900, {"gpu": 900})}))
    decision = await desk.decide()
    assert isinstance(decision, Destination)
    assert decision.addresses[0] == "10.0.0.2:8000"
    assert len(decision.addresses) == 3
    assert desk.made[0].prediction.cached_tokens == 900
    assert desk.state.loads.load("10.0.0.2:8000", desk.now).prefill_tokens == pytest.approx(100)


async def test_one_address_where_the_data_plane_takes_one() -> None:
    decision = await Desk(Stub(), one_address=True).decide()
    assert isinstance(decision, Destination)
    assert len(decision.addresses) == 1


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NotReadyError("no worker"), "index"),
        (UnknownModelError("no tokenizer"), "no-tokenizer"),
        (OverloadedError("more work than time"), "overloaded"),
        (ZeroDivisionError("SECRET"), "fault"),
        (TimeoutError(), "deadline"),
    ],
)
async def test_what_is_missing_leaves_load_alone_and_says_so(
    error: BaseException, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    stub = Stub({"b": Held(900, {"gpu": 900})})
    stub.error = error
    desk = Desk(stub)
    for pod in ("10.0.0.1:8000", "10.0.0.2:8000"):
        desk.state.loads.reported(pod, EngineReport(50, 10, 0.5, desk.now))
    before = degraded(cause)
    assert await desk.picked() == "10.0.0.3:8000"
    assert degraded(cause) == before + 1
    assert desk.made[0].prediction.degraded == cause
    assert "SECRET" not in caplog.text


async def test_slow_tokenizer_is_not_waited_for() -> None:
    stub = Stub()
    stub.seconds = 3_600
    desk = Desk(stub, deadline_ms=100)
    before = degraded("deadline")
    async with asyncio.timeout(90):
        assert await desk.picked()
    assert degraded("deadline") == before + 1


class SkippingSelector(selectors.DefaultSelector):
    """Waits for nothing: where there is nothing to do until a time, it is that time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        self.now += 0.0 if found else timeout or 0.0
        return found


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves by what is waited for alone, however busy the machine is."""

    def __init__(self) -> None:
        self._skipping = SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5, 3_600.0])
def test_what_hangs_degrades_to_load_alone_within_200_ms_by_default(seconds: float) -> None:
    """A tokenizer, a worker or an index that is slow or does not answer: the picker's own deadline decides."""
    stub = Stub({"b": Held(900, {"gpu": 900})})
    stub.seconds = seconds
    desk, before = Desk(stub), degraded("deadline")
    with contextlib.closing(SkippingLoop()) as loop:
        assert isinstance(loop.run_until_complete(desk.decide()), Destination)
        taken = loop.time()
    late = seconds > taken
    assert taken == pytest.approx(min(seconds, PickerSettings().deadline_ms / 1e3))
    assert taken <= 0.2
    assert degraded("deadline") == before + late
    assert desk.made[0].prediction.cached_tokens == (0 if late else 900)
    assert desk.made[0].prediction.degraded == ("deadline" if late else "")


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"{" * 100_000, b"SECRET"])
async def test_unreadable_body_goes_by_load_or_is_refused(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    before = degraded("unreadable")
    assert await Desk(Stub()).picked(body=body)
    assert degraded("unreadable") == before + 1
    refusal = await Desk(Stub(), unreadable="refuse").decide(body=body)
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400
    incoming = Incoming({":path": "/v1/completions"}, body, None, "r1", whole=False)  # the rest may make it right
    assert isinstance(await Desk(Stub(), unreadable="refuse").decider.decide(incoming), Destination)
    assert "SECRET" not in caplog.text + refusal.text


async def test_names_without_end_are_not_kept() -> None:
    stub = Stub()
    stub.error = NotReadyError("no worker")
    desk = Desk(stub)
    assert await desk.picked(body={**BODY, "model": "m" * 100_000, "session_id": "s" * 100_000})
    assert (desk.made[0].model, len(desk.made[0].session)) == ("", 16)


async def test_path_that_is_no_inference_is_routed_and_not_counted() -> None:
    desk = Desk(Stub())
    assert await desk.picked(path="/v1/models", body=None)
    assert not desk.made


async def test_subset_and_model_without_endpoint_are_503() -> None:
    desk = Desk(Stub({"a": Held(900, {"gpu": 900})}))
    assert await desk.picked(subset=frozenset({"10.0.0.3"})) == "10.0.0.3:8000"
    for decision in (await desk.decide(subset=frozenset()), await desk.decide(subset=frozenset({"10.9.9.9:1"}))):
        assert isinstance(decision, Refusal)
        assert (decision.status, decision.reason) == (503, "rejected-no-endpoints")
    desk.state.use([])
    assert isinstance(await desk.decide(), Refusal)


async def test_name_that_no_endpoint_goes_by_may_be_an_adapter_of_any() -> None:
    """Engines take requests for adapters from the first one on, of which no event can have told; others they refuse."""
    stub = Stub()
    desk = Desk(stub)
    desk.state.use([*desk.state.endpoints, *parse_endpoint("10.0.0.4:8000,pod=d,model=n")])
    stub.error = UnknownModelError("no tokenizer")
    assert {await desk.picked(body={**BODY, "model": "new-adapter"}) for _ in range(8)} == {
        one.address for one in desk.state.endpoints
    }
    assert {await desk.picked(body={**BODY, "model": "n"}) for _ in range(4)} == {"10.0.0.4:8000"}
    # By load alone, too, a client's name of a model means those that serve it.
    assert "10.0.0.4:8000" not in {await desk.picked(body={**BODY, "model": "alias"}) for _ in range(8)}
    desk.state.use([one._replace(ready=one.model != "n") for one in desk.state.endpoints])
    refused = await desk.decide(body={**BODY, "model": "n"})
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.text) == (503, "no endpoint serves this model")


async def test_all_past_their_limit_is_429() -> None:
    desk = Desk(Stub(), max_requests=4)
    for text in PODS:
        desk.state.loads.reported(text.partition(",")[0], EngineReport(4, 0, 0.1, desk.now))
    decision = await desk.decide()
    assert isinstance(decision, Refusal)
    assert (decision.status, decision.reason) == (429, "rejected-saturated")


async def test_what_may_be_shed_is_refused_before_the_rest() -> None:
    """Once the endpoints are full on average; by either name of the header, and nothing without one."""
    desk = Desk(Stub(), sheddable=["batch"])
    first, second, third = (text.partition(",")[0] for text in PODS)
    desk.state.loads.reported(first, EngineReport(9, 5, 0.1, desk.now))
    desk.state.loads.reported(second, EngineReport(9, 0, 0.8, desk.now))
    assert await desk.picked(x_gateway_inference_objective="batch")
    desk.state.loads.reported(third, EngineReport(9, 50, 0.9, desk.now))
    for header in names.OBJECTIVES:
        refused = await desk.decide(**{header.replace("-", "_"): "batch"})
        assert isinstance(refused, Refusal)
        assert (refused.status, refused.reason) == (429, "rejected-saturated")
    assert await desk.picked(x_gateway_inference_objective="chat")
    assert await desk.picked()
    stays = await desk.decide(subset=frozenset({first}), x_gateway_inference_objective="batch")
    assert isinstance(stays, Refusal)


async def test_session_comes_back_by_header_or_body() -> None:
    desk = Desk(Stub())
    first = await desk.picked(body={**BODY, "session_id": "s"})
    others = [await desk.picked() for _ in range(2)]
    assert first not in others
    assert await desk.picked(x_session_id="s") == first
    assert all(made.session != "s" for made in desk.made)


def seen(pod: str, seconds_ago: float = 0.0, *sessions: str, **more: int) -> DecisionRecord:
    """A worker's word on the sessions that a pod's events named."""
    seen_ns = time.time_ns() - int(seconds_ago * 1e9)
    told = {session_hash(session): seen_ns for session in sessions or ("s",)} | more
    return DecisionRecord(kind="sessions", request_id="", pod=pod, scorer="w", decided_ns=seen_ns, sessions=told)


@pytest.mark.parametrize("named", [{"x_session_id": "s"}, {"body": {**BODY, "session_id": "s"}}])
async def test_a_session_that_came_by_another_way_is_known_by_its_pods_events(named: dict[str, Any]) -> None:
    """No picker has sent it anywhere; the pod's own events say where it is."""
    for pod, address in (("b", "10.0.0.2:8000"), ("c", "10.0.0.3:8000")):
        desk = Desk(Stub())
        desk.state.take(seen(pod))
        assert await desk.picked(**named) == address
        assert desk.made[0].policy == "picker:session"


async def test_a_session_is_found_by_what_the_header_and_by_what_the_body_names() -> None:
    """Engines may say either on their events; the later place counts, and the header's name is remembered."""
    desk = Desk(Stub())
    both = {"x_session_id": "header", "body": {**BODY, "session_id": "body"}}
    desk.state.take(seen("b", 5, "body"))
    assert await desk.picked(**both) == "10.0.0.2:8000"
    desk.now += 1
    desk.state.take(seen("c", 0, "body"))
    assert await desk.picked(**both) == "10.0.0.3:8000"
    assert {made.session for made in desk.made} == {session_hash("header")}


async def test_pods_events_say_nothing_against_what_is_newer() -> None:
    """Neither against a later decision, nor after the time that a session is remembered."""
    desk = Desk(Stub())
    first = await desk.picked(x_session_id="s")
    desk.state.close("r1")
    other = next(pod for pod, address in (("a", "10.0.0.1:8000"), ("b", "10.0.0.2:8000")) if address != first)
    desk.state.take(seen(other, 5))
    assert await desk.picked(x_session_id="s") == first
    desk.state.close("r1")
    for record in (seen("b", 601, "old"), seen("nobody", 0, "elsewhere")):
        desk.state.take(record)
    taken = {await desk.picked(x_session_id=session) for session in ("old", "elsewhere")}
    assert [made.policy for made in desk.made[-2:]] == ["picker:cold", "picker:cold"]
    assert len(taken) == 2


async def test_a_session_is_not_held_to_the_pod_that_computes_its_prompts() -> None:
    """Prefill pods store a session's blocks too, and answer nothing."""
    desk = Desk(Stub())
    desk.state.use([one for text in (*PODS[:2], PODS[2] + ",role=prefill") for one in parse_endpoint(text)])
    desk.state.take(seen("b", 5))
    desk.state.take(seen("c"))
    assert await desk.picked(x_session_id="s") == "10.0.0.2:8000"


def test_odd_sessions_of_a_record_are_left_out() -> None:
    """What is no hash, or is of a clock that is ahead, harms nobody; there are never more than a picker keeps."""
    desk = Desk(Stub())
    desk.state.take(seen("a", 0, **{"": 1, "x" * 1_000_000: 1, session_hash("ahead"): 2**63 - 1}))
    assert len(desk.state.sessions) == 2
    assert desk.state.sessions.get([session_hash("ahead")], desk.now) == "10.0.0.1:8000"
    many = {f"{number:016x}": time.time_ns() for number in range(100_050)}
    desk.state.take(seen("b", 0, **many))
    assert len(desk.state.sessions) == 100_000


async def test_prefill_pod_is_chosen_unless_decode_holds_the_prefix() -> None:
    stub = Stub(tokens=1_000)
    desk = Desk(stub, split_uncached_tokens=256)
    desk.state.use(
        [one for text in (PODS[0] + ",role=decode", PODS[1] + ",role=prefill") for one in parse_endpoint(text)]
    )
    decision = await desk.decide()
    assert isinstance(decision, Destination)
    assert (decision.addresses, decision.headers) == (("10.0.0.1:8000",), ((names.PREFILL, "10.0.0.2:8000"),))
    stub.held = {"a": Held(900, {"gpu": 900})}
    decision = await desk.decide()
    assert isinstance(decision, Destination)
    assert decision.headers == ()


async def test_peer_source_is_off_by_default_and_names_the_best_other_holder() -> None:
    stub = Stub({"a": Held(900, {"gpu": 900})})
    desk = Desk(stub, peer_tokens=128, peer_port=5710)
    desk.state.loads.given("x", "10.0.0.1:8000", 500_000, desk.now)
    decision = await desk.decide()
    assert isinstance(decision, Destination)
    assert decision.addresses[0] != "10.0.0.1:8000"
    assert dict(decision.headers) == {names.PEER_SOURCE: "10.0.0.1:8000", names.PEER_TOKENS: "900"}
    changed = json.loads(decision.body or b"")
    source = {"kv_request_id": "r1", "remote_host": "10.0.0.1", "remote_port": 5710}
    assert changed.pop("kv_transfer_params") == {"remote_kv_source": source}
    assert changed == BODY
    decision = await desk.decide({**BODY, "kv_transfer_params": {"do_remote_decode": True}})
    assert isinstance(decision, Destination)
    assert json.loads(decision.body or b"")["kv_transfer_params"] == {
        "do_remote_decode": True,
        "remote_kv_source": source,
    }
    plain = await Desk(stub).decide()
    assert isinstance(plain, Destination)
    assert (plain.headers, plain.body) == ((), None)


async def test_peer_source_of_a_rank_has_its_port() -> None:
    """Rank r of a pod listens for other pods on the port of the settings and r more; IPv6 goes without brackets."""
    stub = Stub({"a@dp1": Held(900, {"gpu": 900})})
    desk = Desk(stub, peer_tokens=128, peer_port=5710)
    desk.state.use(parse_endpoint("[fd00::1]:8000,pod=a,ranks=2") + parse_endpoint("10.0.0.9:8000"))
    desk.state.loads.given("x", "[fd00::1]:8001", 500_000, desk.now)
    decision = await desk.decide()
    assert isinstance(decision, Destination)
    assert decision.addresses[0] != "[fd00::1]:8001"
    source = json.loads(decision.body or b"")["kv_transfer_params"]["remote_kv_source"]
    assert source == {"kv_request_id": "r1", "remote_host": "fd00::1", "remote_port": 5711}


async def test_engines_word_is_joined_with_the_decision() -> None:
    desk = Desk(Stub({"b": Held(900, {"gpu": 900})}))
    await desk.decide()
    watch = desk.watch("r1")
    watch.headers(200, "text/event-stream", "10.0.0.2:8000")
    watch.chunk(b'data: {"choices": [{"text": "a"}]}\n\n')
    usage = {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 896}}
    watch.chunk(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
    watch.ended(complete=True)
    (joined,) = desk.joined
    assert (joined.verdict.kind, joined.verdict.cause, joined.usage.cached_tokens) == ("over", "evicted", 896)
    assert joined.first_token_ms >= 0
    assert desk.state.loads.open_requests("10.0.0.2:8000") == 0


async def test_decisions_of_another_picker_count_as_load_until_their_end() -> None:
    desk = Desk(Stub())
    record = DecisionRecord(
        request_id="other", pod="a", scorer="another", endpoint="10.0.0.1:8000", compute_tokens=9_000.0
    )
    desk.state.take(record)
    assert desk.state.loads.load("10.0.0.1:8000", desk.now).prefill_tokens == pytest.approx(9_000)
    desk.state.take(DecisionRecord(request_id="mine", pod="a", scorer="p", endpoint="10.0.0.1:8000"))
    assert desk.state.loads.open_requests("10.0.0.1:8000") == 1
    desk.state.take(DecisionRecord(kind="served", request_id="other", pod="a", scorer="another"))
    assert desk.state.loads.open_requests("10.0.0.1:8000") == 0
