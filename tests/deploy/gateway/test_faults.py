"""What fails around a picker, and what clients see of it: nothing, through a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from kvatlas.deploy.gateway.config import GatewayOptions, document
from kvatlas.deploy.gateway.envoy import Envoy
from kvatlas.deploy.gateway.tiny_tokenizer import text, write_tokenizer
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import POD_HEADER, ServedFleet
from kvatlas.scorer.api.extproc import SERVICE
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.v1 import extproc_pb2 as pb
from tests.waiting import wait_until

#: Nothing listens there: Kafka is away all along.
NO_BROKER = "127.0.0.1:1"


class Process:
    """``kvatlas`` as a process of its own, with its ready line."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self._out = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvatlas.deploy", *arguments], stdout=subprocess.PIPE, stderr=self._out
        )
        self.lines: list[str] = []
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, out: IO[bytes]) -> None:
        for line in out:
            self.lines.append(line.decode())

    @property
    def ready(self) -> str:
        wait_until(lambda: any(line.startswith("ready") for line in self.lines) or self.process.poll() is not None)
        assert self.process.poll() is None
        return next(line for line in self.lines if line.startswith("ready")).strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(90)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(90)
        self._out.close()


class Site:
    """Three simulated engines, one picker process without Kafka, Envoy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tokenizer(folder / "model")
        self.tokenizer = TokenizerSettings(models=(f"sim-model={folder / 'model'}",))
        self.fleet = Fleet(SimPlan(pods=3, step_ms=20.0, max_running=64), clock=time.time, monotonic=time.monotonic)
        self.fleet.start()
        self.served = ServedFleet(self.fleet, self.tokenizer)
        self.served.start()
        self.picker = self.start_picker("127.0.0.1:0")
        self.address = self.picker.ready.split()[1].removeprefix("picker=")
        self.envoy = self.start_envoy()

    def start_picker(self, listen: str) -> Process:
        flags = [part for one in self.served.endpoints() for part in ("--endpoints", one)]
        return Process(
            *("picker", "--brokers", NO_BROKER, "--listen", listen, "--drain-seconds", "0", *flags),
            *("--telemetry-listen", "127.0.0.1:0", "--tokenizer-models", self.tokenizer.models[0]),
            log=self.folder / "picker.log",
        )

    def start_envoy(self) -> Envoy:
        options = GatewayOptions(pickers=[self.address], pods=list(self.served.addresses.values()), observe=True)
        envoy = Envoy(document(options), self.folder)
        envoy.start()
        wait_until(lambda: envoy.healthy_pickers == 1)
        return envoy

    def picked(self) -> int:
        """Requests that the picker's filter has begun."""
        return sum(self.envoy.stats("ext_proc.streams_started").values())

    def failed_open(self) -> int:
        return sum(self.envoy.stats("ext_proc.failure_mode_allowed").values())

    def ask(
        self, *, stream: bool = False, tokens: int = 4, begun: threading.Event | None = None
    ) -> tuple[int, str, bytes]:
        body = {"model": "sim-model", "prompt": "The cache of a pod.", "max_tokens": tokens, "stream": stream}
        request = urllib.request.Request(
            f"http://{self.envoy.address}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=90) as answer:
            data = answer.read(1)
            if begun is not None:
                begun.set()
            return answer.status, answer.headers[POD_HEADER], data + answer.read()

    def close(self) -> None:
        self.envoy.stop()
        self.picker.close()
        self.served.close()
        self.fleet.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def test_everything_may_fail_and_clients_see_answers(site: Site) -> None:
    """Kafka away, engine gone and back, picker killed under a stream and back, Envoy restarted: no request is lost."""
    # Kafka is away from the start: load alone decides, and spreads requests over the engines.
    assert {site.ask()[1] for _ in range(12)} == set(site.served.addresses)
    assert site.picked() >= 12

    # An engine goes away: Envoy tries the picker's next address.
    site.served.stop_pod("pod-1")
    answers = [site.ask() for _ in range(12)]
    assert {status for status, _, _ in answers} == {200}
    assert {pod for _, pod, _ in answers} == {"pod-0", "pod-2"}

    # It is restarted where it was, and gets requests again.
    site.served.restart_pod("pod-1")
    wait_until(lambda: site.ask()[1] == "pod-1")

    # The picker is killed under a token stream: the stream goes on to its end.
    got: list[tuple[int, str, bytes]] = []
    begun = threading.Event()
    streaming = threading.Thread(target=lambda: got.append(site.ask(stream=True, tokens=50, begun=begun)))
    streaming.start()
    assert begun.wait(90)
    site.picker.kill()
    streaming.join(90)
    assert got[0][2].endswith(b"data: [DONE]\n\n")
    # Known to be away, it is left out and the gateway chooses.
    wait_until(lambda: site.envoy.healthy_pickers == 0)
    assert [site.ask()[0] for _ in range(6)] == [200] * 6

    # It comes back on its port, and decides again.
    site.picker = site.start_picker(site.address)
    assert site.picker.ready
    wait_until(lambda: site.envoy.healthy_pickers == 1)
    before = site.picked()
    assert site.ask()[0] == 200
    assert site.picked() > before

    # Envoy is restarted.
    site.envoy.stop()
    site.envoy = site.start_envoy()
    assert [site.ask()[0] for _ in range(4)] == [200] * 4
    assert site.picked() >= 4


async def test_drain_answers_to_the_end(tmp_path: Path) -> None:
    """After SIGTERM the picker says that it is unhealthy, answers what still comes, then ends."""
    process = Process(
        *("picker", "--brokers", NO_BROKER, "--listen", "127.0.0.1:0", "--endpoints", "127.0.0.1:9,pod=a"),
        *("--scrape-seconds", "0", "--drain-seconds", "3"),
        log=tmp_path / "picker.log",
    )
    try:
        address = (await asyncio.to_thread(lambda: process.ready)).split()[1].removeprefix("picker=")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def status(name: str) -> int:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                return int(answer.status)

            for name in ("", "readiness", "liveness", "inference-extension", SERVICE):
                assert await status(name) == health_pb2.HealthCheckResponse.SERVING
            process.process.terminate()
            deadline = time.monotonic() + 90
            while await status(SERVICE) == health_pb2.HealthCheckResponse.SERVING:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert await status("liveness") == health_pb2.HealthCheckResponse.SERVING
            call = channel.stream_stream(
                f"/{SERVICE}/Process",
                request_serializer=pb.ProcessingRequest.SerializeToString,
                response_deserializer=pb.ProcessingResponse.FromString,
            )()
            headers = pb.HttpHeaders(end_of_stream=True)
            headers.headers.headers.add(key=":path", raw_value=b"/v1/models")
            await call.write(pb.ProcessingRequest(request_headers=headers, protocol_config=pb.ProtocolConfiguration()))
            answer = await call.read()
            mutation = answer.request_headers.response.header_mutation
            assert mutation.set_headers[0].header.raw_value == b"127.0.0.1:9"
            call.cancel()
        assert await asyncio.to_thread(process.process.wait, 30) == 0
    finally:
        process.close()


def test_made_up_text_is_tokenized_alike(tmp_path: Path) -> None:
    """The tokenizer of demonstrations finds words again, so that prompts are shorter in tokens than in characters."""
    write_tokenizer(tmp_path)
    sample = text(random.Random(5), 1_000)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(sample).ids
    assert 50 < len(ids) < len(sample) / 2
