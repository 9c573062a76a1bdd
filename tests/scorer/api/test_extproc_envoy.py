"""The external processor behind a real Envoy, in every body mode."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

import pytest

from kvatlas.deploy.gateway.config import KINDS
from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal
from tests.scorer.gateway_rig import Seen, Stand
from tests.waiting import wait_until

MEMBERS = [kind for kind in KINDS if kind != "full-duplex"]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    made = Stand(tmp_path_factory.mktemp("gateway"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def fresh(stand: Stand) -> None:
    stand.decider.asked.clear()
    stand.decider.exchanges.clear()
    stand.decider.decision = lambda _incoming: Destination((stand.pods[1].address,))


@pytest.mark.parametrize("kind", KINDS)
def test_request_goes_where_the_decision_says_with_its_body_whole(stand: Stand, kind: str) -> None:
    envoy = stand.envoy(kind)
    for pod in stand.pods:
        stand.decider.decision = lambda _incoming, pod=pod: Destination((pod.address,), (("x-extra", "é"),))  # type: ignore[misc]
        status, _, answer = stand.ask(envoy, body=b'{"model": "m", "prompt": "hello"}')
        assert status == 200
        assert answer["pod"] == pod.name
        assert answer["body"] == '{"model": "m", "prompt": "hello"}'
        assert answer["headers"][names.DESTINATION] == pod.address
        assert answer["headers"]["x-extra"].encode("utf-8", "surrogateescape").decode() == "é"
    assert stand.decider.asked[-1].body == b'{"model": "m", "prompt": "hello"}'
    assert stand.decider.asked[-1].headers[":path"] == "/v1/completions"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 62_000, 62_001, 1_000_000, 9_000_000])
def test_large_bodies_arrive_byte_for_byte(stand: Stand, kind: str, size: int) -> None:
    envoy = stand.envoy(kind)
    body = hashlib.shake_256(str(size).encode()).digest(size)
    status, _, answer = stand.ask(envoy, body=body)
    assert (status, answer["length"], answer["digest"]) == (200, size, hashlib.sha256(body).hexdigest())
    assert len(stand.decider.asked[-1].body or b"") == size


@pytest.mark.parametrize("kind", KINDS)
def test_request_without_body_is_decided_by_its_headers(stand: Stand, kind: str) -> None:
    status, _, answer = stand.ask(stand.envoy(kind), path="/v1/models", body=None)
    assert (status, answer["pod"], answer["method"]) == (200, "two", "GET")
    assert stand.decider.asked[-1].body is None


@pytest.mark.parametrize("kind", KINDS)
def test_client_names_neither_pod_nor_control_headers(stand: Stand, kind: str) -> None:
    first = stand.pods[0].address
    _, _, answer = stand.ask(
        stand.envoy(kind), **{names.DESTINATION: first, names.PREFILL: first, "x-slo-ttft-ms": "1", "x-kept": "1"}
    )
    assert answer["pod"] == "two"
    assert answer["headers"][names.DESTINATION] == stand.pods[1].address
    assert names.PREFILL not in answer["headers"]
    assert "x-slo-ttft-ms" not in answer["headers"]
    assert answer["headers"]["x-kept"] == "1"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "reason"), [(503, "rejected-no-endpoints"), (429, "rejected-saturated")])
def test_refusal_reaches_the_client(stand: Stand, kind: str, status: int, reason: str) -> None:
    stand.decider.decision = lambda _incoming: Refusal(status, "no pod", reason)
    before = [pod.requests for pod in stand.pods]
    got, headers, answer = stand.ask(stand.envoy(kind))
    assert (got, headers[names.DROPPED_REASON]) == (status, reason)
    error = {"message": "no pod", "type": reason, "param": None, "code": status}
    assert answer == {"type": "error", "error": error}
    assert headers.get("retry-after") == ("1" if status == 429 else None)
    assert [pod.requests for pod in stand.pods] == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "streamed"])  # there it is on its way already
def test_changed_body_replaces_the_old_one(stand: Stand, kind: str) -> None:
    stand.decider.decision = lambda _incoming: Destination((stand.pods[1].address,), body=b'{"model": "other one"}')
    _, _, answer = stand.ask(stand.envoy(kind), body=b'{"model": "m", "prompt": "a longer body than the new one"}')
    assert answer["body"] == '{"model": "other one"}'
    _, _, answer = stand.ask(stand.envoy(kind))  # the connection to the pod is still in step
    assert answer["pod"] == "two"


@pytest.mark.parametrize("kind", MEMBERS)
def test_next_address_is_tried_when_the_first_does_not_answer(stand: Stand, kind: str) -> None:
    gone = "127.0.0.1:1"
    envoy = stand.envoy(kind)
    stand.decider.decision = lambda _incoming: Destination((gone, stand.pods[1].address))
    assert {stand.ask(envoy)[2]["pod"] for _ in range(4)} == {"two"}


@pytest.mark.parametrize("kind", MEMBERS)
def test_fault_in_a_decision_leaves_the_choice_to_the_gateway(stand: Stand, kind: str) -> None:
    def broken(_incoming: Incoming) -> Decision:
        raise ZeroDivisionError("a fault of ours")

    stand.decider.decision = broken
    status, _, answer = stand.ask(stand.envoy(kind), body=b"x" * 100_000)
    assert (status, answer["length"]) == (200, 100_000)


def test_fault_in_a_decision_is_no_wrong_body_where_only_a_named_pod_can_be_dialled(stand: Stand) -> None:
    def broken(_incoming: Incoming) -> Decision:
        raise ZeroDivisionError("a fault of ours")

    stand.decider.decision = broken
    assert stand.ask(stand.envoy("full-duplex"))[0] == 503


@pytest.mark.parametrize("kind", KINDS)
def test_request_id_of_client_gateway_or_decision(stand: Stand, kind: str) -> None:
    envoy = stand.envoy(kind)
    _, _, answer = stand.ask(envoy, **{names.REQUEST_ID: "mine"})
    assert (stand.decider.asked[-1].request_id, answer["headers"][names.REQUEST_ID]) == ("mine", "mine")
    _, _, answer = stand.ask(envoy)
    assert stand.decider.asked[-1].request_id == answer["headers"][names.REQUEST_ID] != ""
    stand.decider.decision = lambda _incoming: Destination((stand.pods[1].address,), request_id="ours")
    _, _, answer = stand.ask(envoy)
    assert answer["headers"][names.REQUEST_ID] == "ours"


@pytest.mark.parametrize("kind", KINDS)
def test_body_past_our_limit_is_refused(stand: Stand, kind: str) -> None:
    status, headers, _ = stand.ask(stand.envoy(kind), body=b"x" * 12_500_000)
    assert (status, headers[names.DROPPED_REASON]) == (413, "rejected-too-large")


@pytest.mark.parametrize("kind", MEMBERS)
def test_status_and_served_pod_are_learned_without_the_body(stand: Stand, kind: str) -> None:
    stand.ask(stand.envoy(kind), **{names.REQUEST_ID: f"seen-{kind}"})
    seen = _wait(stand, f"seen-{kind}")
    assert (seen.status, seen.served, seen.data) == (200, stand.pods[1].address, b"")
    assert seen.kind.startswith("application/json")


@pytest.mark.parametrize("kind", KINDS)
def test_observing_filter_sees_the_response_and_its_request_id(stand: Stand, kind: str) -> None:
    envoy = stand.envoy(kind, observe=True)
    _, _, answer = stand.ask(envoy, **{names.REQUEST_ID: f"observed-{kind}"})

    def whole() -> bool:
        return any(seen.complete and seen.data for seen in stand.decider.exchanges.get(f"observed-{kind}", []))

    wait_until(whole)
    seen = next(one for one in stand.decider.exchanges[f"observed-{kind}"] if one.data)
    assert seen.served == stand.pods[1].address
    assert answer["digest"].encode() in seen.data


@pytest.mark.parametrize("kind", KINDS)
def test_response_passes_through_the_stream_where_that_is_wanted(stand: Stand, kind: str) -> None:
    envoy = stand.envoy(kind, "body", response_body=True)
    status, _, answer = stand.ask(envoy, **{names.REQUEST_ID: f"through-{kind}"})
    assert status == 200
    seen = _wait(stand, f"through-{kind}")
    assert answer["digest"].encode() in seen.data
    assert seen.complete


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_not_held_back(stand: Stand, kind: str) -> None:
    pod = stand.pods[1]
    envoy = stand.envoy(kind)

    async def first_two() -> bytes:
        session = await stand.session()
        pod.next_event.clear()
        got = b""
        async with session.post(f"http://{envoy.address}/stream", data=b"{}") as answer:
            while got.count(b"\n\n") < 2:
                got += await answer.content.readany()
            held = got
            pod.next_event.set()
            got += await answer.content.read()
        assert got == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
        return held

    assert stand.loop.run(first_two()) == b"data: 0\n\ndata: 1\n\n"


@pytest.mark.parametrize("kind", KINDS)
def test_client_that_leaves_ends_the_stream(stand: Stand, kind: str) -> None:
    envoy = stand.envoy(kind)
    waiting = asyncio.Event()

    async def forever(_incoming: Incoming) -> Decision:
        waiting.set()
        await asyncio.sleep(3600)
        return Destination(())

    async def leave() -> None:
        session = await stand.session()
        stand.decider.decision = forever
        sent = asyncio.ensure_future(session.post(f"http://{envoy.address}/v1/completions", data=b"{}"))
        await asyncio.wait_for(waiting.wait(), 90)
        sent.cancel()

    stand.loop.run(leave())
    processor = stand.processors["headers"]
    wait_until(lambda: processor.open == 0)


def _wait(stand: Stand, request_id: str) -> Seen:
    def told() -> bool:
        return any(seen.complete is not None for seen in stand.decider.exchanges.get(request_id, []))

    wait_until(told)
    return stand.decider.exchanges[request_id][-1]
