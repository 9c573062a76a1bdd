"""Start-up checks of a worker: topics, worker id, advertised address."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from pathlib import Path
from typing import Final

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.numbers import port_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.errors import StateFolderError, TopicsError
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.state.damage import set_aside

logger = logging.getLogger(__name__)

_TOPICS_WAIT_SECONDS: Final = 60.0
_ID_CHARACTERS: Final = 255


async def discover(settings: WorkerSettings, kafka: KafkaSettings, client_id: str) -> dict[str, int]:
    """Return topic (without prefix) -> partitions of every topic of a worker, waiting until they all exist.

    Raises:
        TopicsError: some do not exist after a minute, Kafka is not reachable, or their partition counts disagree.
    """
    changelogs = {topic.name: topic for topic in topics.changelog_topics(settings.versioned_app)}
    blocks = settings.blocks_topic
    names = [t.name for t in topics.TOPICS if t.name != topics.BLOCKS] + [blocks, *changelogs]
    counts: dict[str, int] = {}
    deadline = time.monotonic() + _TOPICS_WAIT_SECONDS
    reader = await _reachable(kafka, client_id, deadline)
    try:
        while True:
            for name in names:
                if not counts.get(name):
                    counts[name] = len(await reader.partitions(kafka.topic(name)))
            missing = [kafka.topic(name) for name, count in counts.items() if not count]
            if not missing:
                break
            if time.monotonic() > deadline:
                raise TopicsError(f"topics {', '.join(missing)} do not exist; create them with `kvatlas topics`")
            await asyncio.sleep(0.5)
    finally:
        await reader.__aexit__()
    engine, index = changelogs
    for source, changelog in ((topics.EVENTS, engine), (blocks, index)):
        if counts[source] != counts[changelog]:
            raise TopicsError(
                f"{kafka.topic(source)} has {counts[source]} partitions and "
                f"{kafka.topic(changelog)} {counts[changelog]}; they must be equal: make the changelog anew"
            )
    return counts


async def _reachable(kafka: KafkaSettings, client_id: str, deadline: float) -> RangeReader:
    while True:
        try:
            return await RangeReader(kafka, client_id).__aenter__()
        except LogError as error:
            if time.monotonic() > deadline:
                raise TopicsError(f"Kafka is not reachable: {error}") from error
            logger.warning("Kafka is not reachable yet: %s", error)
            await asyncio.sleep(1.0)


def worker_id(folder: Path) -> str:
    """Return the id of the worker that lives in a state folder, making one at first use.

    Raises:
        StateFolderError: the folder cannot be written.
    """
    path = folder / "worker-id"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and (found := _read_id(path)):
            return found
        made = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        path.write_text(made + "\n", encoding="utf-8")
    except OSError as error:
        raise StateFolderError(
            f"state folder {folder} cannot be used: {error.strerror}; choose another state_dir"
        ) from error
    return made


def _read_id(path: Path) -> str:
    """Return the id in a file; empty when it has none. One that is no id is set aside: a new one harms nothing."""
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (IsADirectoryError, UnicodeDecodeError) as error:
        set_aside(path, f"no worker id: {error}")
        return ""
    if found and (len(found) > _ID_CHARACTERS or not found.isprintable()):
        set_aside(path, "no worker id: too long, or not to be printed")
        return ""
    return found


def advertised(listen: str, advertise: str, port: int) -> str:
    """Return the host:port that scorers are told."""
    if advertise:
        _, colon, told = advertise.rpartition(":")
        return advertise if colon and port_of(told) is not None else f"{advertise}:{port}"
    host = listen.rpartition(":")[0].strip("[]")
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 # compared, not bound
        host = socket.gethostname()
    return f"{host}:{port}"
