"""The changelog of a table: one record batch per flush, and the meta record that ties it to its source.

A flush is one Kafka record batch: one record per changed key (value None removes it), so that the topic stays
compactable, and one meta record last, under a reserved key::

    key   = 00 'kvatlas' 00 'meta'
    value = | version 1 | source offset 8 | receive time 8 | written 8 |      big-endian

``source offset`` is the last record of the source topic that the state reflects, ``receive time`` the bridge's clock
(ns) in its newest message, ``written`` the worker's clock (ns). A broker stores a batch whole or not at all, so
whoever restores the changelog has a state and the offset it belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import VersionError
from kvatlas.streams.errors import ChangelogError

META_VERSION: Final = 1
META_KEY: Final = b"\x00kvatlas\x00meta"
_META: Final = struct.Struct(">Bqqq")


class Meta(NamedTuple):
    """What a partition's state reflects; see the module's text."""

    source_offset: int = -1
    receive_ns: int = 0
    written_ns: int = 0


def encode_meta(meta: Meta) -> bytes:
    """Encode a meta record's value."""
    return _META.pack(META_VERSION, *meta)


def decode_meta(value: bytes) -> Meta:
    """Decode a meta record's value.

    Raises:
        VersionError: another version, or not a meta record.
    """
    if len(value) != _META.size or value[0] != META_VERSION:
        raise VersionError(f"table meta record of {len(value)} bytes, version {value[:1]!r}; expected {META_VERSION}")
    _, source_offset, receive_ns, written_ns = _META.unpack(value)
    return Meta(source_offset, receive_ns, written_ns)


async def send_batch(
    producer: Any, topic: str, partition: int, writes: Mapping[bytes, bytes | None], meta: bytes
) -> int:
    """Send a flush as one record batch and wait until the brokers have it.

    When the writes do not fit into one batch of the producer's largest size, they go in several, in order, and the
    last one has the meta record: a state restored from the first ones alone is a prefix whose source records are
    applied again, which changes nothing.

    Args:
        producer: the started ``AIOKafkaProducer``.
        topic: changelog topic.
        partition: partition of the table.
        writes: key -> value, None to remove.
        meta: the meta record's value.

    Returns:
        Offset of the last record.

    Raises:
        ChangelogError: the brokers did not acknowledge it.
    """
    try:
        batch = producer.create_batch()
        append = batch.append
        for key, value in writes.items():
            if append(key=key, value=value, timestamp=None) is None:
                await (await producer.send_batch(batch, topic, partition=partition))
                batch = producer.create_batch()
                append = batch.append
                append(key=key, value=value, timestamp=None)
        if append(key=META_KEY, value=meta, timestamp=None) is None:
            await (await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            batch.append(key=META_KEY, value=meta, timestamp=None)
        count = batch.record_count()
        placed = await (await producer.send_batch(batch, topic, partition=partition))
    except KafkaError as error:
        raise ChangelogError(
            f"changelog {topic}/{partition}: {len(writes)} entries not acknowledged: {error!r}; will be sent again"
        ) from error
    last: int = placed.offset + count - 1
    return last
