"""Loads of pods: read off engines' pages and load sockets, told in the pods' records at a bounded rate."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.loads import EngineLoads
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.loads import LOAD_REPEAT_SECONDS, LOAD_STALE_SECONDS, fresh_load
from tests.bridge.engines.fake_engine import fake_engine

PAGE = """vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:num_requests_waiting{engine="1"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
"""
RANKS = [{"running": 3.0, "waiting": 1.0, "cache_usage": 0.25}, {"running": 4.0, "waiting": 0.0, "cache_usage": 0.75}]


@pytest.fixture
async def loads(bridge: Any) -> AsyncIterator[EngineLoads]:
    """The loads of the bridge of one test, read until its end."""
    made = EngineLoads(bridge.streams)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def say(bridge: Any, spec: EngineSpec, topic: bytes, number: int = 0) -> None:
    """Let an engine say something, so that its pod is known."""
    bridge.endpoints[spec.key].received([topic, number.to_bytes(8, "big"), encode_batch(float(number), [], spec.rank)])


def load_of(bridge: Any, spec: EngineSpec) -> dict[str, float]:
    """What the pod of an endpoint reports by its session."""
    session = bridge.endpoints[spec.key].session
    return session.record.load if session is not None else {}


async def test_ranks_behind_one_page_are_read_once_and_told_apart(bridge: Any, loads: EngineLoads) -> None:
    """Each rank's own series are its pod's load; a pod that has said nothing yet is not asked."""
    with fake_engine({"/metrics": PAGE}) as url:
        specs = [
            EngineSpec(live=f"ipc://@{url}-{rank}", pod="p", rank=rank, ranks=2, metrics=f"{url}/metrics")
            for rank in range(3)
        ]
        for spec in specs:
            bridge.open(spec)
        for spec in specs[:2]:
            say(bridge, spec, b"kv@p@m")
        await bridge.until(lambda: [load_of(bridge, spec) for spec in specs[:2]] == RANKS)
    assert bridge.endpoints[specs[2].key].session is None
    assert loads.reads["ok"] >= 1


async def test_a_pod_named_by_its_serving_address_is_asked_there(bridge: Any, loads: EngineLoads) -> None:
    """llm-d's topics name pods so; no option is needed."""
    with fake_engine({"/metrics": PAGE}) as url:
        address = url.partition("://")[2]
        spec = EngineSpec(live=f"ipc://@{address}-events")
        bridge.open(spec)
        say(bridge, spec, f"kv@{address}@m".encode())
        await bridge.until(lambda: load_of(bridge, spec) == {"running": 7.0, "waiting": 1.0, "cache_usage": 0.5})


async def test_the_load_socket_goes_before_the_page(bridge: Any, loads: EngineLoads) -> None:
    """SGLang's own messages are the load; garbage on the socket is passed over."""
    context: zmq.Context[Any] = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.bind("tcp://127.0.0.1:*")
    address = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    try:
        spec = EngineSpec(
            live=f"ipc://@{address}-events", load=address, metrics="http://127.0.0.1:1/metrics", engine="sglang"
        )
        bridge.open(spec)
        say(bridge, spec, b"kv@p@m")
        stat = msgspec.msgpack.encode(["LoadStat", 2, 5, 500, 1000, 0, 4096])
        async with asyncio.timeout(90):
            for number in itertools.count():
                publisher.send_multipart([b"load", number.to_bytes(8, "big"), b"\xc1" if number % 2 else stat])
                if load_of(bridge, spec):
                    break
                await asyncio.sleep(0.01)
        assert load_of(bridge, spec) == {"running": 2.0, "waiting": 5.0, "cache_usage": 0.5}
        assert not loads.reads["failed"]
    finally:
        publisher.close(linger=0)
        context.term()


async def test_records_tell_a_change_at_once_and_the_rest_now_and_then(bridge: Any) -> None:
    """An unchanged load is no reason for a record until it would soon be stale; a pod that is gone has none."""
    spec = EngineSpec(live="ipc://@told-events")
    bridge.open(spec)
    say(bridge, spec, b"kv@p@m")
    session = bridge.endpoints[spec.key].session
    seconds = 10**9
    told = []
    for at, running in ((0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (2 + LOAD_REPEAT_SECONDS, 2.0)):
        session.changed = False
        session.report({"running": running}, int((100 + at) * seconds))
        told.append(session.changed)
    assert told == [True, False, True, False, True]
    session.write_record()
    record = bridge.log.pod("p")
    assert record.load == {"running": 2.0}
    read = record.load_ns
    assert fresh_load(record, read + int(LOAD_STALE_SECONDS * seconds)) == {"running": 2.0}
    assert fresh_load(record, read + int(LOAD_STALE_SECONDS * seconds) + 1) is None
    session.end()
    assert (bridge.log.pod("p").state, bridge.log.pod("p").load) == ("gone", {})
    assert fresh_load(bridge.log.pod("p"), read * 2) == {}
