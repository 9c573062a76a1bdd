"""Crashes of a worker, many times in a row: it comes back, answers, and its index is true; no attempt hangs.

``KVATLAS_CRASH_TIMES`` says how often in a row (default 20).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.audit.audit import read_records
from kvatlas.deploy.processes import supervisor
from kvatlas.deploy.processes.child import document
from kvatlas.deploy.processes.supervisor import Child, Kept
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta, encode_meta, send_claim
from tests.integration.streams_support import assert_true, fleet_of, make_topics, producing, until_true

TIMES = int(os.environ.get("KVATLAS_CRASH_TIMES", "20"))
SESSION_SECONDS = 4.0
#: Tasks that come and go are seen within it.
SEEN_SECONDS = 3.0
#: A running worker has more kinds of tasks than these, and one that keeps the metadata of each client of Kafka.
TASKS, CLIENTS, OF_CLIENTS = 35, 4, "AIOKafkaClient._md_synchronizer"
#: Of a start and a restore on a busy machine; what hangs takes for ever.
BACK_SECONDS = 120.0


class Worker:
    """A worker that is kept running, and broken."""

    def __init__(self, kafka: KafkaSettings, folder: Path) -> None:
        self.folder = folder
        settings = WorkerSettings(
            state_dir=str(folder / "state"),
            listen="127.0.0.1:0",
            telemetry_listen="",
            session_timeout_seconds=SESSION_SECONDS,
        )
        sections = {"kafka": kafka, "log": LogSettings(), "worker": settings}

        def start(restarts: Restarts) -> Child:
            return Child("worker", document("worker", sections, prepared=True, restarts=restarts), folder / "log")

        self.kept = Kept("worker", start)
        self.kept._pauses = supervisor.Pauses(0.1, 0.1)

    async def until(self, true: Callable[[], object], seconds: float = BACK_SECONDS) -> None:
        """Look after it until something is true."""
        deadline = time.monotonic() + seconds
        while not true():
            self.kept.look()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            await asyncio.sleep(0.05)

    async def ready(self) -> None:
        """Wait until it answers."""

        def answers() -> bool:  # the child is another one after a restart
            return self.kept.child.ready.is_set()

        await self.until(answers)

    @property
    def pid(self) -> int:
        """Its process now."""
        return self.kept.child.process.pid

    def close(self) -> None:
        """End it, also one that is stopped."""
        if self.kept.child.process.poll() is None:
            self.kept.child.process.kill()
        self.kept.child.wait(time.monotonic() + 90)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Worker]]:
    monkeypatch.setattr(supervisor, "_COMMAND", (sys.executable, str(Path(__file__).with_name("faulty_child.py"))))
    monkeypatch.setenv("FAULTS", str(tmp_path))
    made: list[Worker] = []
    yield made
    for worker in made:
        worker.close()


async def metas(kafka: KafkaSettings) -> dict[int, Meta]:
    """The newest meta record of each partition of the index's changelog."""
    found: dict[int, Meta] = {}

    def take(record: object) -> None:
        if record.key == META_KEY:  # type: ignore[attr-defined]
            found[record.partition] = decode_meta(record.value)  # type: ignore[attr-defined]

    await read_records(kafka, topics.changelog_topics("kvatlas")[1].name, take)
    return found


async def fence(worker: Worker, kafka: KafkaSettings, producer: object) -> None:
    for number, meta in (await metas(kafka)).items():
        claim = meta._replace(epoch=meta.epoch + 5, owner=77)
        changelog = kafka.topic(topics.changelog_topics("kvatlas")[1].name)
        await send_claim(producer, changelog, number, encode_meta(claim))


async def kill(worker: Worker, kafka: KafkaSettings, producer: object) -> None:
    os.kill(worker.pid, signal.SIGKILL)


async def stand_still(worker: Worker, kafka: KafkaSettings, producer: object) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    await asyncio.sleep(SESSION_SECONDS + 1.5)
    os.kill(worker.pid, signal.SIGCONT)


@pytest.mark.timeout(TIMES * 150 + 300)
@pytest.mark.parametrize("crash", [fence, kill, stand_still])
async def test_a_worker_comes_back_every_time(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[Worker], crash: Callable[..., object]
) -> None:
    """After each crash it answers again and what was sent meanwhile is in the index."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    worker = Worker(kafka, tmp_path)
    workers.append(worker)
    await worker.ready()
    async with producing(kafka) as producer:
        for _ in range(TIMES):
            before = worker.kept.restarts.total
            fleet.serve(20)
            await fleet.flush(producer)
            await crash(worker, kafka, producer)  # type: ignore[misc]
            fleet.serve(20)
            await fleet.flush(producer)
            if crash is not stand_still:  # a worker that nobody has replaced may go on
                await worker.until(lambda before=before: worker.kept.restarts.total > before)  # type: ignore[misc]
            await worker.ready()
            await look_after(worker, until_index(kafka, fleet))


@pytest.mark.timeout(TIMES * 150 + 300)
async def test_an_error_in_any_background_task_is_repaired_by_a_restart(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[Worker]
) -> None:
    """Task by task, each at least once: the worker handles it or its process ends, and the index is true afterwards."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    worker = Worker(kafka, tmp_path)
    workers.append(worker)
    await worker.ready()
    names = await background_tasks(worker, tmp_path / "names")
    of_clients = [name for name in names if name.startswith(OF_CLIENTS)]
    assert len(of_clients) == CLIENTS, names
    async with producing(kafka) as producer:
        for turn in range(max(TIMES, len(names))):
            await worker.ready()
            broken = names[turn % len(names)]
            before = worker.kept.restarts.total
            (tmp_path / "asked").write_text(broken)
            (tmp_path / "asked").replace(tmp_path / "break")  # nobody reads a part of it
            await worker.until(lambda: not (tmp_path / "break").exists())
            if broken in of_clients:  # nothing may show it for long, so the process has to end at once
                await worker.until(lambda before=before: worker.kept.restarts.total > before)  # type: ignore[misc]
                await worker.ready()
            fleet.serve(20)
            await fleet.flush(producer)
            try:
                await look_after(worker, until_index(kafka, fleet))
            except Exception as error:
                log = (tmp_path / "log").read_text()
                raise AssertionError(f"not repaired after an error in {broken}:\n{log[-3000:]}") from error
    assert worker.kept.restarts.total > len(names) // 2


async def background_tasks(worker: Worker, file: Path) -> list[str]:
    """Names of the worker's tasks, once all that a running worker has are there and no new one has come for a while."""
    seen: list[str] = []
    since = time.monotonic()

    def settled() -> bool:
        nonlocal seen, since
        names = file.read_text().splitlines() if file.exists() else []
        if names != seen:
            seen, since = names, time.monotonic()
        whole = len(seen) > TASKS and sum(name.startswith(OF_CLIENTS) for name in seen) >= CLIENTS
        return whole and time.monotonic() - since > SEEN_SECONDS

    await worker.until(settled)
    return [name for name in seen if name not in UNTOUCHED]


#: What is broken with these is the test's own, or the main of the process.
UNTOUCHED = {"_serve", "_until", "_stop_when", "Background.until", "WorkerService.run_until", "Event.wait"}


async def until_index(kafka: KafkaSettings, fleet: object) -> None:
    """Wait until the index is what the pods hold."""
    assert_true(await until_true(kafka, fleet.truth()), 4)  # type: ignore[attr-defined]


async def look_after(worker: Worker, work: object) -> None:
    """Keep the worker running until something is done."""
    task = asyncio.ensure_future(work)  # type: ignore[arg-type]
    while not task.done():
        worker.kept.look()
        await asyncio.sleep(0.05)
    task.result()
