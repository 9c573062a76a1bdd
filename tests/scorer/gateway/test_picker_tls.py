"""A picker that serves TLS: a client that trusts it and Envoy are answered, others are not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.gateway.config import GatewayOptions, document
from kvatlas.deploy.gateway.envoy import Envoy
from kvatlas.scorer.api.extproc import SERVICE
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.service import PickerService
from kvatlas.scorer.picker import names
from kvatlas.scorer.v1 import extproc_pb2 as pb
from tests.scorer.api.certificates import Authority
from tests.scorer.gateway_rig import Stand


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA that gateways trust."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    """Two pods, and a client."""
    made = Stand(tmp_path)
    yield made
    made.close()


def secured(authority: Authority, address: str = "127.0.0.1:9") -> PickerService:
    """A picker of one endpoint with a certificate of its own."""
    certificate, key = authority.pair("picker")
    return PickerService(
        PickerSettings(
            listen="127.0.0.1:0",
            endpoints=[f"{address},pod=a"],
            tls_certfile=str(certificate),
            tls_keyfile=str(key),
            scrape_seconds=0.0,
            drain_seconds=0.0,
        ),
        None,
    )


async def healthy(channel: grpc.aio.Channel) -> int:
    """Ask for the picker's health."""
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=90)
    return int(answer.status)


async def test_who_trusts_the_certificate_is_answered_and_nobody_else(authority: Authority, tmp_path: Path) -> None:
    """Health and picks over TLS; a client of another CA and one without TLS are turned away."""
    service = secured(authority)
    await service.start()
    target = service.address.replace("127.0.0.1", "localhost")
    trusting = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    stranger = grpc.ssl_channel_credentials(Authority(tmp_path / "stranger").certificate.read_bytes())
    try:
        async with grpc.aio.secure_channel(target, trusting) as channel:
            assert await healthy(channel) == health_pb2.HealthCheckResponse.SERVING
            call = channel.stream_stream(
                f"/{SERVICE}/Process",
                request_serializer=pb.ProcessingRequest.SerializeToString,
                response_deserializer=pb.ProcessingResponse.FromString,
            )(timeout=90)
            headers = pb.HttpHeaders(end_of_stream=True)
            headers.headers.headers.add(key=":path", raw_value=b"/v1/models")
            await call.write(pb.ProcessingRequest(request_headers=headers, protocol_config=pb.ProtocolConfiguration()))
            answer = await call.read()
            picked = answer.request_headers.response.header_mutation.set_headers[0].header
            assert (picked.key, picked.raw_value) == (names.DESTINATION, b"127.0.0.1:9")
            call.cancel()
        for channel in (grpc.aio.secure_channel(target, stranger), grpc.aio.insecure_channel(target)):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await healthy(channel)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        await service.stop()


def test_envoy_verifies_the_picker_and_asks_it(authority: Authority, stand: Stand, tmp_path: Path) -> None:
    """Health check and stream go over TLS; the request arrives at the pod that was picked."""
    service = secured(authority, stand.pods[1].address)
    stand.loop.run(service.start())
    options = GatewayOptions(
        pickers=[service.address],
        pods=[pod.address for pod in stand.pods],
        cafile=str(authority.certificate),
        server_name="localhost",
    )
    envoy = Envoy(document(options), tmp_path)
    try:
        envoy.start()
        deadline = time.monotonic() + 90
        healthy_members = "cluster.picker.membership_healthy"
        while envoy.stats(healthy_members).get(healthy_members) != 1:
            assert time.monotonic() < deadline, "Envoy does not see the picker"
            time.sleep(0.02)
        for _ in range(3):
            status, _, answer = stand.ask(envoy)
            assert (status, answer["pod"]) == (200, "two")
            assert answer["headers"][names.DESTINATION] == stand.pods[1].address
    finally:
        envoy.stop()
        stand.loop.run(service.stop())


async def test_a_pair_that_is_none_says_which_files(authority: Authority, tmp_path: Path) -> None:
    """A key of another certificate, and text that is no PEM, are refused at the start with both names."""
    certificate, _ = authority.pair("one")
    _, other = authority.pair("two")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing")
    for files in ((certificate, other), (nonsense, other), (certificate, tmp_path / "missing.key")):
        settings = PickerSettings(
            listen="127.0.0.1:0",
            endpoints=["127.0.0.1:9,pod=a"],
            tls_certfile=str(files[0]),
            tls_keyfile=str(files[1]),
            scrape_seconds=0.0,
            drain_seconds=0.0,
        )
        service = PickerService(settings, None)
        with pytest.raises(SettingsError, match=str(files[1])):
            await service.start()
        await service.stop()
