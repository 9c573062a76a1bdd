"""Tests of the scorer over real gRPC servers: routing, partial answers, status codes, roles, fronts, decisions."""

from __future__ import annotations

import hashlib
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from kvatlas.bridge.runtime.methods import add_service
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.client import score_request
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.v1 import block_index_pb2 as index_pb
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig


async def test_scores_come_from_all_owners_with_their_freshness(rig: Rig) -> None:
    """Keys spread over two workers give one exact score per pod and the offset of every partition."""
    rig.pod("a", 10)
    rig.pod("b", 4)
    await rig.worker(Index("w0", rig.table, {0, 1}))
    await rig.worker(Index("w1", rig.table, {2, 3}))
    answer = await (await rig.client()).score("m", tokens=TOKENS)
    assert {p: (s.score, s.matched_tokens) for p, s in answer.scores.items()} == {"a": (10, 160), "b": (4, 64)}
    assert not answer.freshness.partial
    assert {(p.applied_offset, p.role) for p in answer.freshness.partitions} == {(7, "active")}
    assert answer.freshness.pods["a"].last_sequence == 3


async def test_a_dead_worker_makes_partial_answers_and_a_standby_whole_ones(rig: Rig) -> None:
    """Without its worker an answer is flagged partial; with a standby it is whole and flagged so."""
    rig.pod("a", 10)
    gone = await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    await gone.stop(0)
    client = await rig.client()
    answer = await client.score("m", tokens=TOKENS)
    assert answer.freshness.partial
    assert {p.role for p in answer.freshness.partitions} == {"unanswered"}
    await rig.worker(Index("w1", rig.table, set(range(PARTITIONS)), role=2), standby=True)
    answer = await client.score("m", tokens=TOKENS)
    assert (answer.scores["a"].score, answer.freshness.partial, answer.freshness.standby) == (10, False, True)


async def test_a_moved_partition_is_asked_of_the_owner_that_the_answer_names(rig: Rig) -> None:
    """A worker that no longer owns a partition redirects, and the caller sees a whole answer."""
    rig.pod("a", 10)
    server = grpc.aio.server()
    add_service(server, index_pb, Index("w1", rig.table, set(range(PARTITIONS))))
    owner = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    rig.stack.push_async_callback(server.stop, 0)
    stale = Index("w0", rig.table, {0}, owner=owner)
    await rig.worker(stale)
    rig.announce("w0", next(iter(rig.workers.endpoints())), [0, 1, 2, 3])
    answer = await (await rig.client()).score("m", tokens=TOKENS)
    assert answer.scores["a"].score == 10
    assert not answer.freshness.partial


async def test_errors_have_the_right_status(rig: Rig) -> None:
    """Wrong input, no workers, too much and unknown requests each have their own code."""
    client = await rig.client()

    async def code(name: str, request: Any) -> str:
        with pytest.raises(ClientError) as caught:
            await client.call(name, request)
        return caught.value.code

    assert await code("Score", pb.ScoreRequest(model="m", tokens=[1])) == "UNAVAILABLE"
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    assert await code("Score", pb.ScoreRequest(tokens=[1])) == "INVALID_ARGUMENT"
    assert await code("Score", pb.ScoreRequest(model="m", tokens=[1], prompt="x")) == "INVALID_ARGUMENT"
    assert await code("Score", pb.ScoreRequest(model="m", tokens_packed=b"123")) == "INVALID_ARGUMENT"
    assert await code("Score", pb.ScoreRequest(model="m", tokens=[1], strategy="no")) == "INVALID_ARGUMENT"
    assert await code("Score", pb.ScoreRequest(model="m", tokens_packed=bytes(4 * 1_048_577))) == "RESOURCE_EXHAUSTED"
    assert await code("Score", pb.ScoreRequest(model="m", prompt="text")) == "NOT_FOUND"
    assert await code("ReportDecision", pb.ReportDecisionRequest(request_id="r", pod="a")) == "FAILED_PRECONDITION"


async def test_multimodal_items_have_bounds(rig: Rig) -> None:
    """Items outside of the prompt, with truncation, or stacked a hundred deep are refused; two on one place are not."""
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()

    async def code(*places: tuple[int, int], **fields: Any) -> str:
        items = [pb.MultimodalItem(identifier="x", offset=offset, length=length) for offset, length in places]
        try:
            await client.score("m", tokens=TOKENS, multimodal=items, **fields)
        except ClientError as error:
            return error.code
        return "OK"

    assert await code((0, 160), (0, 160)) == "OK"
    assert await code((0, 161)) == await code((0, 0)) == "INVALID_ARGUMENT"
    assert await code((0, 16), truncate_tokens=32) == "INVALID_ARGUMENT"
    assert await code(*[(0, 160)] * 100) == "RESOURCE_EXHAUSTED"


async def test_a_decision_holds_blocks_for_the_next_request_until_it_expires(rig: Rig) -> None:
    """A reported decision scores speculatively at once, is published, and ends with time or the pod's epoch."""
    rig.pod("a", 0)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()
    await client.score("m", tokens=TOKENS, request_id="r1")
    answer = await client.call("ReportDecision", pb.ReportDecisionRequest(request_id="r1", pod="a"))
    assert answer.blocks == 10
    assert [record.request_id for record in rig.sent] == ["r1"]
    scored = await client.score("m", tokens=TOKENS)
    assert scored.scores["a"].speculative_blocks == 10
    assert scored.scores["a"].score == pytest.approx(9.0)
    rig.core.decisions.expire(answer.expires_ns)
    assert not (await client.score("m", tokens=TOKENS)).scores
    await client.call(
        "ReportDecision",
        pb.ReportDecisionRequest(request_id="r2", pod="a", request=score_request("m", tokens=TOKENS)),
    )
    rig.pod("a", 0, epoch=5, valid_from=5)
    assert not (await client.score("m", tokens=TOKENS)).scores


async def test_pick_weighs_cache_against_load_and_explain_says_why(rig: Rig) -> None:
    """A cached but busy pod loses when load weighs enough; the walk's end is told per pod."""
    rig.pod("a", 10)
    rig.pod("b", 2)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()
    request = pb.PickRequest(request=score_request("m", tokens=TOKENS))
    assert (await client.call("Pick", request)).pod == "a"
    request.load["a"].waiting = 10
    request.weights["waiting"] = 3
    picked = await client.call("Pick", request)
    assert picked.pod == "b"
    assert [c.pod for c in picked.candidates] == ["b", "a"]
    why = await client.call("Explain", score_request("m", tokens=TOKENS))
    assert why.walks["b"].matched_blocks == 2
    assert why.walks["b"].reason == "block 2: not held on any tier"
    assert len(why.blocks) == 10


async def test_explain_calls_a_guess_dead_where_the_walk_does(rig: Rig) -> None:
    """A decision of before a clear of the GPU, or before a gap, holds nothing: Explain says so, and no later one."""
    rig.pod("a", 2)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()
    await client.call(
        "ReportDecision", pb.ReportDecisionRequest(request_id="r", pod="a", request=score_request("m", tokens=TOKENS))
    )

    async def told() -> tuple[set[str], int]:
        answer = await client.call("Explain", score_request("m", tokens=TOKENS))
        guesses = {holder.state for block in answer.blocks for holder in block.holders if holder.tier == "speculative"}
        return guesses, answer.walks["a"].matched_blocks

    assert await told() == ({"speculative"}, 10)
    rig.pod("a", 0, epoch=5, gpu_valid_from=5)
    assert await told() == ({"dead"}, 0)
    rig.pod("a", 0, epoch=6, suspect_before=6)
    assert await told() == ({"dead"}, 2)


async def test_roles_and_tenants_are_enforced(tmp_path: Any) -> None:
    """Without a token, without the role, or with another tenant's salt nothing is answered."""
    digest = hashlib.sha256(b"secret").hexdigest()
    file = tmp_path / "tokens.toml"
    file.write_text(f'[tokens.r]\nsha256 = "{digest}"\nroles = ["score"]\ncache_salts = ["mine"]\n')
    rig = Rig(tokens_file=str(file))
    async with rig.stack:
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        for token, name, request, code in (
            ("", "Score", score_request("m", tokens=[1]), "UNAUTHENTICATED"),
            ("wrong", "Score", score_request("m", tokens=[1]), "UNAUTHENTICATED"),
            ("secret", "ListPods", pb.ListPodsRequest(), "PERMISSION_DENIED"),
            ("secret", "Score", score_request("m", tokens=[1], cache_salt="other"), "PERMISSION_DENIED"),
        ):
            with pytest.raises(ClientError) as caught:
                await (await rig.client(token=token)).call(name, request)
            assert caught.value.code == code
        assert await (await rig.client(token="secret")).score("m", tokens=[1], cache_salt="mine") is not None
        await rig.router.close()


async def test_http_answers_the_same_as_grpc(rig: Rig) -> None:
    """A POST with JSON scores; a wrong field is a 400 that names it."""
    rig.pod("a", 10)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    front = HttpFront(Calls(rig.core, ScorerSettings(http_listen="127.0.0.1:0"), rig.guard), rig.inflight)
    address = await front.start()
    rig.stack.push_async_callback(front.stop)
    async with aiohttp.ClientSession() as session:
        async with session.post(f"http://{address}/v1/score", json={"model": "m", "tokens": TOKENS}) as reply:
            assert (await reply.json())["scores"]["a"]["matched_blocks"] == 10
        async with session.post(f"http://{address}/v1/score", json={"model": "m", "tokenz": TOKENS}) as reply:
            assert reply.status == 400
            assert "tokenz" in (await reply.json())["error"]
        async with session.get(f"http://{address}/v1/pods") as reply:
            assert [pod["pod"] for pod in (await reply.json())["pods"]] == ["a"]
