"""The changelog of a table: one record batch per flush, and the meta record that ties it to its source.

A flush is one Kafka record batch: one record per changed key (value None removes it), so that the topic stays
compactable, between two meta records under a reserved key; the first repeats the meta of the flush before::

    key   = 00 'kvatlas' 00 'meta'
    value = | version 1 | source offset 8 | receive time 8 | written 8 | epoch 8 | owner 8 |      big-endian

``source offset`` is the last record of the source topic that the state reflects, ``receive time`` the bridge's clock
(ns) in its newest message, ``written`` the worker's clock (ns), ``epoch`` and ``owner`` the writer's claim, see
``fence``. Version 1 ends before the epoch; version 2 is written. A broker stores a batch whole or not at all, so
whoever restores the changelog has a state and the offset it belongs to, and knows at once whose records follow.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import VersionError, WireError
from kvatlas.streams.errors import ChangelogError

META_VERSION: Final = 2
META_KEY: Final = b"\x00kvatlas\x00meta"
#: Epochs count owners one by one; who claims to be past this one is none.
_EPOCH_MAX: Final = 1 << 48
_META: Final = struct.Struct(">Bqqqqq")
_META_1: Final = struct.Struct(">Bqqq")


class Meta(NamedTuple):
    """What a partition's state reflects; see the module's text."""

    source_offset: int = -1
    receive_ns: int = 0
    written_ns: int = 0
    epoch: int = 0
    owner: int = 0


class Placed(NamedTuple):
    """Where a flush is in the changelog.

    Attributes:
        last: offset of its last record.
        records: how many records it has.
    """

    last: int
    records: int

    def follows(self, before: int | None) -> bool:
        """Return whether nothing lies between it and the offset ``before`` (None: the topic's start)."""
        return self.last - self.records == (-1 if before is None else before)


def encode_meta(meta: Meta) -> bytes:
    """Encode a meta record's value."""
    return _META.pack(META_VERSION, *meta)


def decode_meta(value: bytes) -> Meta:
    """Decode a meta record's value.

    Raises:
        VersionError: another version, or not a meta record.
        WireError: numbers that no meta record has.
    """
    if len(value) == _META_1.size and value[0] == 1:
        meta = Meta(*_META_1.unpack(value)[1:])
    elif len(value) == _META.size and value[0] == META_VERSION:
        meta = Meta(*_META.unpack(value)[1:])
    else:
        raise VersionError(f"table meta record of {len(value)} bytes, version {value[:1]!r}; expected {META_VERSION}")
    if meta.source_offset < -1 or min(meta[1:]) < 0 or meta.epoch > _EPOCH_MAX:
        raise WireError(f"not a table meta record: {meta}")
    return meta


async def send_batch(
    producer: Any, topic: str, partition: int, writes: Mapping[bytes, bytes | None], *, before: bytes, after: bytes
) -> Placed:
    """Send a flush as one record batch and wait until the brokers have it.

    When the writes do not fit into one batch of the producer's largest size, they go in several, in order, each with
    the meta record ``before`` at its head, and the last one with ``after`` at its end: a state restored from the
    first ones alone is a prefix whose source records are applied again, which changes nothing.

    Args:
        producer: the started ``AIOKafkaProducer``.
        topic: changelog topic.
        partition: partition of the table.
        writes: key -> value, None to remove.
        before: meta record of the state before the flush.
        after: meta record of the state with it.

    Returns:
        Where it is.

    Raises:
        ChangelogError: the brokers did not acknowledge it.
    """
    batch, count = _batch(producer, before), 0
    try:
        for key, value in chain(writes.items(), [(META_KEY, after)]):
            if batch.append(key=key, value=value, timestamp=None) is None:
                count += batch.record_count()
                await _send(producer, topic, partition, batch)
                batch = _batch(producer, before)
                batch.append(key=key, value=value, timestamp=None)
        count += batch.record_count()
        last = await _send(producer, topic, partition, batch)
    except KafkaError as error:
        raise ChangelogError(
            f"changelog {topic}/{partition}: {len(writes)} entries not acknowledged: {error!r}; will be sent again"
        ) from error
    return Placed(last, count)


async def send_claim(producer: Any, topic: str, partition: int, meta: bytes) -> int:
    """Write a claim, a meta record alone, to the end of a changelog and return its offset.

    Raises:
        ChangelogError: the brokers did not acknowledge it.
    """
    try:
        return await _send(producer, topic, partition, _batch(producer, meta))
    except KafkaError as error:
        raise ChangelogError(f"changelog {topic}/{partition}: claim not acknowledged: {error!r}") from error


def _batch(producer: Any, meta: bytes) -> Any:
    batch = producer.create_batch()
    batch.append(key=META_KEY, value=meta, timestamp=None)
    return batch


async def _send(producer: Any, topic: str, partition: int, batch: Any) -> int:
    placed = await (await producer.send_batch(batch, topic, partition=partition))
    last: int = placed.offset + batch.record_count() - 1
    return last
