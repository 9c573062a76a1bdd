"""Records that Faust drops around a rebalance, on the real Kafka: none may stay unapplied."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService
from tests.integration.streams_support import assert_true, fleet_of, make_topics, producing, until_true


async def test_what_the_streams_queues_lose_is_read_again(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """Emptied as a rebalance empties them, in the middle of ingestion and at its end, nothing stays unapplied."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    service = WorkerService(WorkerSettings(state_dir=str(tmp_path / "w")), kafka)
    await service.start()
    try:
        await asyncio.wait_for(service.ready.wait(), 90)
        app = service._app
        assert app is not None
        lost = 0
        async with producing(kafka) as producer:
            turn = 0
            while turn < 20 or not lost:  # what the queues hold when they are looked at is a matter of luck
                turn += 1
                fleet.serve(6)
                await fleet.flush(producer)
                for _ in range(10):
                    lost += sum(queue.qsize() for queue in app.flow_control._queues)
                    app.flow_control.clear()
                    await asyncio.sleep(0.005)
        assert_true(await until_true(kafka, fleet.truth()), 4)
        assert sum(tasks.missed for tasks in app.tasks.values()) == 0
    finally:
        await service.stop()
