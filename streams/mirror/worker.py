"""The mirror of one worker: wiring only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvatlas.bridge.model import topics
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.mirror.changes import changed_keys
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.part import MirrorSource
from kvatlas.streams.mirror.redis_link import connect, where
from kvatlas.streams.mirror.server import MirrorServer
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.state.restore import MAX_LOCAL_AGE_SECONDS

#: Changed keys that may wait for a server that is away, about 100 MB; with more the partition is copied again.
_PENDING_KEYS: Final = 1_000_000


def worker_mirror(
    settings: WorkerSettings,
    kafka: KafkaSettings,
    *,
    worker: str,
    partitions: int,
    table: BulkTable,
    generation: Callable[[], int],
    pods: PodDirectory,
    pods_known: Callable[[], bool],
) -> Mirror:
    """Return the mirror of a worker's ``block_index``.

    Args:
        settings: the worker's.
        kafka: how to reach the brokers.
        worker: the worker's id.
        partitions: of ``kv-blocks``.
        table: what is mirrored.
        generation: returns the Kafka generation of the assignment.
        pods: what ``kv-pods`` says.
        pods_known: tells whether ``kv-pods`` has been read to what was its end.

    Raises:
        SettingsError: the server's address or the password file cannot be used.
    """
    changelog = kafka.topic(topics.changelog_topics(settings.versioned_app)[1].name)

    async def changed(partition: int, after: MirrorPosition, through: int) -> list[bytes] | None:
        return await changed_keys(
            kafka,
            changelog,
            partition,
            after=after,
            through=through,
            most=_PENDING_KEYS,
            max_age_seconds=MAX_LOCAL_AGE_SECONDS,
            client_id=f"kvatlas-mirror-{worker}",
        )

    client = connect(
        settings.mirror, cafile=settings.mirror_cafile, password_file=settings.mirror_password_file, retries=0
    )
    return Mirror(
        MirrorServer(client, settings.mirror_prefix),
        worker=worker,
        layout=MirrorLayout(
            partitions=partitions,
            block_size_tokens=settings.block_size_tokens,
            index_version=settings.index_version,
        ),
        source=MirrorSource(
            states=lambda: table.store.states,
            generation=generation,
            pod=pods.merged.get,
            pods=pods.records,
            pods_known=pods_known,
            changed=changed,
        ),
        address=where(settings.mirror),
        pending_keys=_PENDING_KEYS,
    )
