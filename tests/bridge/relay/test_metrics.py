"""What the bridge shows on its metrics page."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.ingest.loads import EngineLoads
from kvatlas.bridge.kafka.producer import RecordProducer
from kvatlas.bridge.relay.metrics import BridgeCollector
from kvatlas.bridge.runtime.settings import KafkaSettings

_CLEAR = [{"type": "AllBlocksCleared"}]


async def test_the_counts_of_a_stream_are_on_the_page(bridge: Any) -> None:
    """Traffic, a repaired hole, a lost one, a dead letter and an endpoint that waits show in the numbers."""
    kafka = RecordProducer(KafkaSettings(brokers="127.0.0.1:1"))
    kafka.sent, kafka.sent_bytes, kafka.failures, kafka.pending_bytes = 5, 700, 1, 90
    kafka.latency.add(0.004, 5)
    with EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@p@m") as engine:
        for number, host in enumerate(("127.0.0.1", "localhost")):
            text = f"{engine.endpoint},{engine.replay_endpoint}".replace("127.0.0.1", host)
            endpoint = bridge.open(parse_engine(text)[0])
            engine.publish(_CLEAR * 2, timestamp=float(number))
            await bridge.until(lambda endpoint=endpoint: endpoint.pod == "p")
        await bridge.until(lambda: len(bridge.log.messages("p")) == 2)
        engine.withhold(b"\x93\x01\x90\xc0")
        engine.publish(_CLEAR, timestamp=3.0)
        await bridge.until(lambda: len(bridge.log.messages("p")) == 4)
        engine.skip()
        engine.publish(_CLEAR, timestamp=5.0)
        await bridge.until(lambda: len(bridge.log.messages("p")) == 5)
        endpoint.received([b"alone"])
        loads = EngineLoads(bridge.streams)
        loads.reads["ok"] = 3
        registry = CollectorRegistry()
        registry.register(BridgeCollector(bridge.streams, loads, kafka))

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"kvatlas_bridge_{name}", labels)

        assert (value("messages_total"), value("events_total")) == (5, 6)
        assert value("bytes_total") == bridge.shared.bytes > 0
        assert [value(f"{name}_total", pod="p") for name in ("lost", "gaps", "restarts")] == [1, 1, 0]
        assert (value("repaired_total", pod="p") or 0) >= 1
        assert value("last_sequence", pod="p") == 5
        assert (value("silence_seconds", pod="p") or 0.0) > 0
        assert value("held_messages", pod="p") == 0
        assert value("duplicates_total", pod="p") is not None
        assert value("dead_letters_total", reason="wrong number of frames") == 1
        assert (value("conflicts_total"), value("waiting_endpoints")) == (1, 1)
        assert (value("acknowledged_total"), value("kafka_bytes_total"), value("kafka_failures_total")) == (5, 700, 1)
        assert value("buffer_bytes") == 90
        assert value("load_reads_total", result="ok") == 3
        assert generate_latest(registry).decode().count('silence_seconds{pod="p"}') == 1
        assert value("kafka_seconds_bucket", le="0.005") == 5
