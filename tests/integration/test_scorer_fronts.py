"""A whole scorer on a real Kafka with all its fronts: what is open by default, what is guarded, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.v1 import scorer_pb2, tokenization_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
SECRET = "velvet anchor quartz"


async def _code(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def _services(address: str) -> list[str] | str:
    """Ask for the names of the services by reflection; the status code where it is off.

    By the blocking client: that of asyncio reports INTERNAL where a stream is refused before it has sent a message.
    """
    with grpc.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        try:
            answers = list(stub.ServerReflectionInfo(requests))
        except grpc.RpcError as error:
            return str(error.code().name)
        return sorted(service.name for service in answers[0].list_services_response.service)


async def test_what_a_scorer_opens_and_what_it_refuses(
    brokers: str, topic_prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reflection only when asked for, tokens on every front and socket, the message limit, and no prompt in a log."""
    caplog.set_level(logging.DEBUG)
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=1)
    await ensure_topics(kafka, TOPICS)
    tokens = tmp_path / "tokens.toml"
    digest = hashlib.sha256(b"zirconium").hexdigest()
    tokens.write_text(f'[tokens.router]\nsha256 = "{digest}"\nroles = ["score"]\n', encoding="utf-8")
    socket = tmp_path / "scorer.socket"
    settings = ScorerSettings(
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        socket=str(socket),
        tokens_file=str(tokens),
        max_message_bytes=64 * 1024,
    )
    guarded = ScorerService(settings, kafka, tokenizer=TokenizerSettings(models=(f"m={FOLDER}",)))
    plain = ScorerService(ScorerSettings(listen="127.0.0.1:0", reflection=True), kafka)
    try:
        await guarded.start()
        await plain.start()
        assert await asyncio.to_thread(_services, guarded.address) == "UNIMPLEMENTED"
        assert await asyncio.to_thread(_services, plain.address) == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "indexer.v1.IndexerService",
            "kvatlas.v1.Scorer",
            "tokenization.TokenizationService",
        ]
        ask = tokenization_pb2.TokenizeRequest(input=SECRET, model_name="m")
        headers = (("authorization", "Bearer zirconium"),)
        for target in (guarded.address, f"unix:{socket}"):
            async with grpc.aio.insecure_channel(target) as channel:
                tokenizer: Any = stub_of(channel, tokenization_pb2)
                scorer: Any = stub_of(channel, scorer_pb2)
                score = pb.ScoreRequest(model="m", prompt=SECRET)
                assert await _code(tokenizer.Tokenize(ask)) == "UNAUTHENTICATED"
                assert await _code(tokenizer.Tokenize(ask, metadata=headers)) == "OK"
                assert await _code(scorer.Score(score)) == "UNAUTHENTICATED"
                assert await _code(scorer.Score(score, metadata=headers)) == "UNAVAILABLE"  # there is no worker
                assert await _code(scorer.Explain(score, metadata=headers)) == "PERMISSION_DENIED"
                large = pb.ScoreRequest(model="m", prompt=SECRET * 4_000)
                assert await _code(scorer.Score(large, metadata=headers)) == "RESOURCE_EXHAUSTED"
        async with aiohttp.ClientSession() as session:
            url = f"http://{guarded.http_address}/v1/score"
            for token, status in (("", 401), ("zirconium", 503)):
                sent = {"Authorization": f"Bearer {token}"} if token else {}
                async with session.post(url, json={"model": "m", "prompt": SECRET}, headers=sent) as reply:
                    assert reply.status == status
    finally:
        await guarded.stop()
        await plain.stop()
    assert [word for word in (*SECRET.split(), "zirconium") if word in caplog.text] == []
