"""Who may ask what, over real servers: TLS, mutual TLS, roles, tenants, limits, and logs without prompts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.deploy.cli.entry import main
from kvatlas.scorer.api import llmd
from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.api.security import Guard, server_credentials
from kvatlas.scorer.client import AsyncScorerClient, channel_credentials, score_request
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import indexer_pb2, tokenization_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.api.certificates import Authority
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
SECRET = "velvet anchor quartz"


def _asking(salt: str = "") -> dict[str, Any]:
    """Return a request of every unary operation about a salt."""
    score = score_request("m", tokens=TOKENS, cache_salt=salt)
    return {
        "Score": score,
        "ScoreBatch": pb.ScoreBatchRequest(requests=[score]),
        "Pick": pb.PickRequest(request=score),
        "ReportDecision": pb.ReportDecisionRequest(request_id="r", pod="a", request=score),
        "Explain": score,
        "ListPods": pb.ListPodsRequest(),
    }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA that servers and clients trust."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


def _tokens(folder: Path, **callers: tuple[list[str], list[str] | None]) -> str:
    """Write a tokens file; each token is its caller's name."""
    lines = []
    for name, (roles, salts) in callers.items():
        lines += [f"[tokens.{name}]", f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"']
        lines.append(f"roles = {json.dumps(roles)}")
        lines += [f"cache_salts = {json.dumps(salts)}"] if salts is not None else []
    file = folder / "tokens.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


class Served:
    """A rig behind gRPC and HTTP with the credentials of its settings."""

    def __init__(self, rig: Rig, grpc_address: str, http_address: str) -> None:
        self.rig, self.grpc, self.http = rig, grpc_address, http_address

    async def code(self, name: str, request: Any, **options: Any) -> str:
        """Call an operation as a client would and return its status."""
        async with AsyncScorerClient(self.grpc, timeout_seconds=60, **options) as client:
            try:
                await client.call(name, request)
            except ClientError as error:
                return error.code
            return "OK"


async def _served(**settings: Any) -> AsyncIterator[Served]:
    pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
    rig = Rig(pool=pool, http_listen="127.0.0.1:0", **settings)
    async with rig.stack:
        rig.pod("a", 10)
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        front = HttpFront(rig.calls, rig.inflight)
        rig.stack.push_async_callback(front.stop)
        yield Served(rig, await rig.serve(server_credentials(rig.settings)), await front.start())
        await rig.router.close()
    await asyncio.to_thread(pool.close)


def _credentials(trusted: Authority, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    ca = trusted.certificate.read_bytes()
    return channel_credentials(ca, *(path.read_bytes() for path in pair or ()))


async def test_tls_is_for_those_who_trust_the_server(authority: Authority, stranger: Authority) -> None:
    """With a certificate the server answers over TLS; nobody gets through in the clear or with another CA."""
    certificate, key = authority.pair("server")
    async for served in _served(tls_certfile=str(certificate), tls_keyfile=str(key)):
        ask = ("Score", score_request("m", tokens=TOKENS))
        assert await served.code(*ask, credentials=_credentials(authority)) == "OK"
        assert await served.code(*ask, credentials=_credentials(stranger)) == "UNAVAILABLE"
        assert await served.code(*ask) == "UNAVAILABLE"
        async with aiohttp.ClientSession() as session:
            trust = ssl.create_default_context(cafile=str(authority.certificate))
            async with session.get(f"https://{served.http}/v1/pods", ssl=trust) as reply:
                assert [pod["pod"] for pod in (await reply.json())["pods"]] == ["a"]
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(f"https://{served.http}/v1/pods")
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://{served.http}/v1/pods")


async def test_mutual_tls_refuses_clients_without_a_certificate_of_its_ca(
    authority: Authority, stranger: Authority
) -> None:
    """With a client CA only its certificates get an answer, over gRPC and HTTP."""
    certificate, key = authority.pair("server")
    mine, other = authority.pair("client"), stranger.pair("client")
    files = {"tls_certfile": certificate, "tls_keyfile": key, "tls_client_cafile": authority.certificate}
    async for served in _served(**{name: str(path) for name, path in files.items()}):
        ask = ("Score", score_request("m", tokens=TOKENS))
        assert await served.code(*ask, credentials=_credentials(authority, mine)) == "OK"
        assert await served.code(*ask, credentials=_credentials(authority)) == "UNAVAILABLE"
        assert await served.code(*ask, credentials=_credentials(authority, other)) == "UNAVAILABLE"
        async with aiohttp.ClientSession() as session:
            for pair, allowed in ((mine, True), (None, False), (other, False)):
                trust = ssl.create_default_context(cafile=str(authority.certificate))
                if pair is not None:
                    trust.load_cert_chain(*pair)
                if allowed:
                    async with session.get(f"https://{served.http}/v1/pods", ssl=trust) as reply:
                        assert reply.status == 200
                else:
                    with pytest.raises(aiohttp.ClientError):
                        await session.get(f"https://{served.http}/v1/pods", ssl=trust)


async def test_the_commands_speak_mutual_tls_with_a_token(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kvatlas pods` with its own pair and a token file lists the pods; without the pair it says UNAVAILABLE."""
    certificate, key = authority.pair("server")
    mine = authority.pair("client")
    settings = {"tls_certfile": certificate, "tls_keyfile": key, "tls_client_cafile": authority.certificate}
    settings["tokens_file"] = Path(_tokens(tmp_path, reader=(["explain"], None)))
    token = tmp_path / "token"
    token.write_text("reader\n", encoding="utf-8")
    async for served in _served(**{name: str(path) for name, path in settings.items()}):
        flags = [f"--scorer={served.grpc}", f"--tls-cafile={authority.certificate}", f"--token-file={token}", "--json"]
        own = [f"--tls-certfile={mine[0]}", f"--tls-keyfile={mine[1]}"]
        assert await asyncio.to_thread(main, ["pods", *flags, *own]) == 0
        assert json.loads(capsys.readouterr().out)["pod"] == "a"
        assert await asyncio.to_thread(main, ["pods", *flags, "--timeout=3"]) == 1
        assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize("files", [{"tls_certfile": "none", "tls_keyfile": "none"}])
def test_a_missing_certificate_is_a_setting_that_is_wrong(files: dict[str, str]) -> None:
    """A file that is not there is named with its setting."""
    with pytest.raises(SettingsError, match=r"\[scorer\] tls_keyfile none: No such file"):
        server_credentials(Rig(**files).settings)


@pytest.mark.parametrize(
    "text",
    ['[tokens.r]\nsha256 = "abc"\nroles = ["score"]', '[tokens.r]\nroles = ["king"]', "not toml", "[other]", "\xff"],
)
def test_a_wrong_tokens_file_lets_nobody_in(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with the file ends the start, instead of serving without tokens."""
    file = tmp_path / "tokens.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match="tokens_file"):
        Guard.from_settings(Rig().settings.__class__(tokens_file=str(file)))


_SCORE = {"Score", "ScoreBatch", "Pick", "ReportDecision"}
_EXPLAIN = {"Explain", "ListPods", "WatchPods"}


@pytest.mark.parametrize(
    ("caller", "allowed"),
    [("scores", _SCORE), ("explains", _EXPLAIN), ("both", _SCORE | _EXPLAIN), ("boss", _SCORE | _EXPLAIN)],
)
async def test_each_operation_needs_its_role(tmp_path: Path, caller: str, allowed: set[str]) -> None:
    """score, explain and admin open exactly their operations, over gRPC and HTTP alike."""
    roles = {"scores": ["score"], "explains": ["explain"], "both": ["score", "explain"], "boss": ["admin"]}
    async for served in _served(tokens_file=_tokens(tmp_path, **{name: (r, None) for name, r in roles.items()})):
        found = {name for name, ask in _asking().items() if await served.code(name, ask, token=caller) == "OK"}
        async with AsyncScorerClient(served.grpc, token=caller) as client:
            if "WatchPods" in allowed:
                assert (await asyncio.wait_for(anext(client.watch_pods()), 60)).pod == "a"
            else:
                with pytest.raises(ClientError, match="PERMISSION_DENIED"):
                    await asyncio.wait_for(anext(client.watch_pods()), 60)
        assert found == allowed - {"WatchPods"}
        over_http = await _over_http(served, caller)
        assert {name for name, status in over_http.items() if status == 200} == allowed - {"WatchPods"}
        assert set(over_http.values()) <= {200, 403}
        assert set((await _over_http(served, "unknown")).values()) == {401}
        assert {await served.code(name, ask) for name, ask in _asking().items()} == {"UNAUTHENTICATED"}


async def _over_http(served: Served, token: str) -> dict[str, int]:
    one = {"model": "m", "tokens": TOKENS}
    bodies = {
        "Score": ("score", one),
        "ScoreBatch": ("score_batch", {"requests": [one]}),
        "Pick": ("pick", {"request": one}),
        "ReportDecision": ("report_decision", {"request_id": "r", "pod": "a", "request": one}),
        "Explain": ("explain", one),
    }
    headers = {"Authorization": f"Bearer {token}"}
    found = {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for name, (path, body) in bodies.items():
            async with session.post(f"http://{served.http}/v1/{path}", json=body) as reply:
                found[name] = reply.status
        async with session.get(f"http://{served.http}/v1/pods") as reply:
            found["ListPods"] = reply.status
    return found


async def test_a_tenant_sees_what_its_salt_allows_and_nothing_else(tmp_path: Path) -> None:
    """A tenant's token finds the blocks of its salt; other salts and none are refused in every operation."""
    file = _tokens(tmp_path, mine=(["admin"], ["mine"]), any=(["admin"], None), plain=(["score"], [""]))
    async for served in _served(tokens_file=file):
        served.rig.hold("a", block_keys(root_key("m", None, "mine"), pack_tokens(TOKENS), 16)[:3])
        served.rig.hold("a", block_keys(root_key("m", None, "theirs"), pack_tokens(TOKENS), 16)[:7])
        for caller, salt, blocks in (("mine", "mine", 3), ("any", "theirs", 7), ("any", "", 10), ("plain", "", 10)):
            async with AsyncScorerClient(served.grpc, token=caller) as client:
                answer = await client.score("m", tokens=TOKENS, cache_salt=salt)
                assert {pod: entry.matched_blocks for pod, entry in answer.scores.items()} == {"a": blocks}
        for salt in ("theirs", ""):
            codes = {name: await served.code(name, ask, token="mine") for name, ask in _asking(salt).items()}
            assert codes.pop("ListPods") == "OK"
            assert set(codes.values()) == {"PERMISSION_DENIED"}
        mixed = [score_request("m", tokens=TOKENS, cache_salt=salt) for salt in ("mine", "theirs")]
        assert (
            await served.code("ScoreBatch", pb.ScoreBatchRequest(requests=mixed), token="mine") == "PERMISSION_DENIED"
        )


async def test_a_tenant_cannot_report_on_the_prompt_of_another(tmp_path: Path) -> None:
    """A request id that was scored with another salt is refused; the tenant's own is taken."""
    async for served in _served(tokens_file=_tokens(tmp_path, mine=(["score"], ["mine"]), any=(["score"], None))):
        for caller, salt in (("mine", "mine"), ("any", "theirs")):
            ask = score_request("m", tokens=TOKENS, cache_salt=salt, request_id=f"of-{salt}")
            assert await served.code("Score", ask, token=caller) == "OK"
        for request_id, code in (("of-mine", "OK"), ("of-theirs", "PERMISSION_DENIED"), ("no", "FAILED_PRECONDITION")):
            report = pb.ReportDecisionRequest(request_id=request_id, pod="a")
            assert await served.code("ReportDecision", report, token="mine") == code
        assert [record.request_id for record in served.rig.sent] == ["of-mine"]


async def test_tokens_guard_the_other_front_too(tmp_path: Path) -> None:
    """llm-d's services want the role score as well, and a tenant that must name a salt cannot ask there."""
    pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
    callers = {"scores": (["score"], None), "explains": (["explain"], None), "mine": (["score"], ["mine"])}
    async for served in _served(tokens_file=_tokens(tmp_path, **callers)):
        rig = served.rig
        server = grpc.aio.server(interceptors=[llmd.GuardTokenization(rig.guard)])
        llmd.add_to(server, rig.calls, pool)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        rig.stack.push_async_callback(server.stop, 0)
        found = {}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            indexer: Any = stub_of(channel, indexer_pb2)
            tokenizer: Any = stub_of(channel, tokenization_pb2)
            for caller in ("", *callers):
                headers = (("authorization", f"Bearer {caller}"),) if caller else ()
                for call, request in (
                    (indexer.GetPodScores, indexer_pb2.GetPodScoresRequest(prompt="x", model_name="m")),
                    (tokenizer.Tokenize, tokenization_pb2.TokenizeRequest(input="x", model_name="m")),
                    (tokenizer.RenderCompletion, tokenization_pb2.RenderCompletionRequest(prompt="x", model_name="m")),
                ):
                    try:
                        await call(request, metadata=headers)
                        code = "OK"
                    except grpc.aio.AioRpcError as error:
                        code = error.code().name
                    found.setdefault(caller, []).append(code)
        assert found == {
            "": ["UNAUTHENTICATED"] * 3,
            "scores": ["OK"] * 3,
            "explains": ["PERMISSION_DENIED"] * 3,
            "mine": ["PERMISSION_DENIED", "OK", "OK"],
        }
    await asyncio.to_thread(pool.close)


async def test_limits_answer_with_their_own_status() -> None:
    """Each limit refuses what is past it as RESOURCE_EXHAUSTED, names it, and lets through what is not."""
    limits = {"max_prompt_bytes": 200_000, "max_tokens": 250_000}
    user = {"role": "user", "content": "x"}
    async for served in _served(**limits):
        async with AsyncScorerClient(served.grpc) as client:
            for name, good, bad, setting in (
                (
                    "Score",
                    score_request("m", prompt="x" * 200_000),
                    score_request("m", prompt="x" * 200_001),
                    "max_prompt_bytes",
                ),
                (
                    "Score",
                    score_request("m", prompt="€" * 66_666),
                    score_request("m", prompt="€" * 66_667),
                    "max_prompt_bytes",
                ),
                (
                    "Score",
                    score_request("m", tokens=[1] * 250_000),
                    score_request("m", tokens=[1] * 250_001),
                    "max_tokens",
                ),
                (
                    "Pick",
                    *(pb.PickRequest(request=score_request("m", tokens=[1] * n)) for n in (250_000, 250_001)),
                    "max_tokens",
                ),
                (
                    "Explain",
                    *(score_request("m", messages=[user] * n) for n in (4_096, 4_097)),
                    "messages; at most 4096",
                ),
                (
                    "Score",
                    *(score_request("m", messages=[{"role": "user", "content": "x" * n}]) for n in (199_900, 200_000)),
                    "max_prompt_bytes",
                ),
                (
                    "ScoreBatch",
                    *(pb.ScoreBatchRequest(requests=[score_request("m", tokens=[1])] * n) for n in (256, 257)),
                    "requests; at most 256",
                ),
            ):
                await client.call(name, good)
                with pytest.raises(ClientError, match=setting) as caught:
                    await client.call(name, bad)
                assert caught.value.code == "RESOURCE_EXHAUSTED"


async def test_requests_and_streams_past_the_concurrency_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """While as many requests or streams are open as allowed, one more is refused at once; later it is not."""
    monkeypatch.setattr("kvatlas.scorer.api.core.MAX_WATCHERS", 1)
    rig = Rig(max_concurrent=2, deadline_ms=60_000)
    go = asyncio.Event()

    class Waiting(Index):
        entered = 0

        async def Lookup(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            self.entered += 1
            await go.wait()
            return await super().Lookup(request, context)

    async with rig.stack:
        rig.pod("a", 10)
        index = Waiting("w0", rig.table, set(range(PARTITIONS)))
        await rig.worker(index)
        client = await rig.client(timeout_seconds=60)
        held = [asyncio.ensure_future(client.score("m", tokens=TOKENS)) for _ in range(2)]
        async with asyncio.timeout(60):
            while index.entered < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(ClientError, match="max_concurrent") as caught:
            await client.score("m", tokens=TOKENS)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        go.set()
        assert [(await answer).scores["a"].score for answer in held] == [10, 10]
        assert (await client.score("m", tokens=TOKENS)).scores["a"].score == 10

        stream = client.watch_pods()
        assert (await anext(stream)).pod == "a"
        with pytest.raises(ClientError, match="streams are open") as caught:
            await anext(client.watch_pods())
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        await rig.router.close()


async def test_no_log_line_holds_a_prompt_a_salt_or_a_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG neither answers nor refusals leave text, token ids, salts or bearer tokens in any logger."""
    caplog.set_level(logging.DEBUG)
    token = "zirconium"
    text = f"{SECRET} " * 10
    async for served in _served(tokens_file=_tokens(tmp_path, **{token: (["admin"], None)})):
        async with AsyncScorerClient(served.grpc, token=token) as client:
            await client.score("m", prompt=text, cache_salt=SECRET, request_id="r")
            await client.score("m", messages=[{"role": "user", "content": text}])
            await client.call("Explain", score_request("m", prompt=text))
            for wrong in (
                score_request("m", prompt=text, strategy=SECRET),
                score_request("unknown", prompt=text),
                score_request("m", prompt=text, tokens=TOKENS),
            ):
                with pytest.raises(ClientError):
                    await client.call("Score", wrong)
        assert await served.code("Score", score_request("m", prompt=text), token=f"no-{token}") == "UNAUTHENTICATED"
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            for body in (json.dumps({"model": "m", "prompt": text}), '{"prompt": "' + text, '{"' + SECRET + '": 1}'):
                async with session.post(f"http://{served.http}/v1/score", data=body) as reply:
                    await reply.read()
    assert [word for word in (*SECRET.split(), token, "100, 101") if word in caplog.text] == []
    assert caplog.records
