"""Clients of Kafka while no broker answers."""

from __future__ import annotations

import asyncio
import time

from kvatlas.bridge.kafka.config import pace_metadata


async def test_metadata_is_not_asked_for_in_a_hot_loop() -> None:
    """A request that nobody answered holds up the next one; an answered one does not."""

    class Client:
        answers = False
        asked = 0

        async def _metadata_update(self, cluster: object, topics: object) -> bool:
            self.asked += 1
            await asyncio.sleep(0)
            return self.answers

    client = Client()
    pace_metadata(client, 0.05)
    started = time.monotonic()
    for _ in range(4):
        assert not await client._metadata_update(None, None)
    assert time.monotonic() - started >= 0.18
    patient = Client()
    patient.answers = True
    pace_metadata(patient, 3600)
    async with asyncio.timeout(60):
        for _ in range(100):
            assert await patient._metadata_update(None, None)
    assert (client.asked, patient.asked) == (4, 100)
