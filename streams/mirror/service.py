"""The mirror as a worker's task, and as a service of its own: wiring only."""

from __future__ import annotations

import asyncio
import os
import socket

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.member import GroupMember
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry
from kvatlas.streams.errors import TopicsError
from kvatlas.streams.mirror.layout import MirrorLayout
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.redis_link import connect, where
from kvatlas.streams.mirror.server import MirrorServer
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.state.restore import MAX_LOCAL_AGE_SECONDS


def group_of_mirrors(settings: WorkerSettings) -> str:
    """Return the consumer group, without the prefix of the deployment, that shares partitions out among mirrors."""
    return f"{settings.versioned_app}-mirror-{settings.mirror_prefix}"


class MirrorService:
    """Mirrors the index of one app, beside others of its group.

    Args:
        settings: the workers', with the server's address.
        kafka: how to reach the brokers.
        name: of this mirror among others; empty makes one of host and process.

    Attributes:
        ready: set once it follows the log.
        address: of the server.

    Raises:
        SettingsError: the server's address or the password file cannot be used.
    """

    def __init__(self, settings: WorkerSettings, kafka: KafkaSettings, *, name: str = "") -> None:
        if not settings.mirror:
            raise SettingsError("[worker] mirror: name the server that gets the copy, redis:// or rediss://")
        self.ready = asyncio.Event()
        self.address = where(settings.mirror)
        self._settings, self._kafka = settings, kafka
        self._name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._client = connect(
            settings.mirror, cafile=settings.mirror_cafile, password_file=settings.mirror_password_file, retries=0
        )
        self._telemetry = Telemetry(settings.telemetry_listen)
        self._background = Background()
        self._pods = PodDirectory(settings.index_version)
        self._follower = TopicFollower(kafka, topics.PODS, self._pods.apply, client_id=f"kvatlas-mirror-{self._name}")

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often its process was started again."""
        self._telemetry.tell_restarts(restarts)

    async def start(self) -> None:
        """Start; returns once the changelog is known.

        Raises:
            TopicsError: there is no changelog.
            LogError: Kafka does not answer.
        """
        self._telemetry.add_check("pods", lambda: None if self.ready.is_set() else "kv-pods is not read yet")
        await self._telemetry.start()
        mirror = await self.mirror()
        self._background.start(mirror.run(), "mirror")
        await self._follower.wait(60.0)
        self.ready.set()

    async def mirror(self) -> Mirror:
        """Return the mirror, with its pods followed.

        Raises:
            TopicsError: there is no changelog.
            LogError: Kafka does not answer.
        """
        settings, kafka = self._settings, self._kafka
        changelog = kafka.topic(topics.changelog_topics(settings.versioned_app)[1].name)
        async with RangeReader(kafka, f"kvatlas-mirror-{self._name}") as reader:
            partitions = await reader.partitions(changelog)
        if not partitions:
            raise TopicsError(f"topic {changelog} does not exist; create it with `kvatlas topics`")
        self._follower.start()
        self._background.watch(self._follower.task)
        return Mirror(
            MirrorServer(self._client, settings.mirror_prefix),
            GroupMember(
                kafka,
                changelog,
                f"{kafka.topic_prefix}{group_of_mirrors(settings)}",
                client_id=f"kvatlas-mirror-{self._name}",
                session_timeout_seconds=settings.session_timeout_seconds,
            ),
            pods=self._pods,
            pods_known=self._follower.caught_up,
            name=self._name,
            layout=MirrorLayout(
                partitions=len(partitions),
                block_size_tokens=settings.block_size_tokens,
                index_version=settings.index_version,
            ),
            max_age_seconds=MAX_LOCAL_AGE_SECONDS,
            address=self.address,
        )

    async def run(self) -> None:
        """Start and mirror until cancelled: as a task of a worker."""
        try:
            await self.start()
            await self.run_until(asyncio.Event())
        finally:
            await self.stop()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Mirror until ``stop`` is set, or raise what ended it."""
        await self._background.until(stop)

    async def stop(self) -> None:
        """Stop; what was not sent is sent by who takes over."""
        await self._background.stop()
        await self._follower.stop()
        await self._telemetry.stop()
