"""Pod ids: their 64-bit references, partitions and keys on by-pod topics."""

from __future__ import annotations

import ipaddress
from typing import Final

import xxhash

from kvatlas.bridge.model.numbers import RANKS_MAX, port_of, whole
from kvatlas.bridge.model.topics import BASE_VERSION


def pod_ref(pod_id: str) -> int:
    """Return the 64-bit reference that stands for a pod id in block updates and index entries."""
    return xxhash.xxh3_64_intdigest(pod_id.encode())


def store_ref(store: str) -> int:
    """Return the reference of a shared store; its blocks belong to no pod but to all that mount it."""
    return xxhash.xxh3_64_intdigest(b"\x00store\x00" + store.encode())


def pod_partition(pod_id: str, partitions: int) -> int:
    """Return the partition of every by-pod topic that carries a pod's records."""
    return (pod_ref(pod_id) >> 32) % partitions


def pod_name(pod: str, dp_rank: int | None, dp_size: int = 1) -> str:
    """Return the pod id: one pod id is one ordered event stream."""
    if dp_rank is None or (dp_rank == 0 and dp_size <= 1):
        return pod
    return f"{pod}@dp{dp_rank}"


def serving_address(pod_id: str) -> str:
    """Return the serving address in a pod id that is one (``IP:PORT``, as llm-d's topics have it), else nothing."""
    name = pod_id.partition("@dp")[0]
    host, colon, port = name.rpartition(":")
    if not colon or not port_of(port):
        return ""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return ""
    return name


def rank_of(pod_id: str) -> int | None:
    """Return the data-parallel rank in a pod id, None where it names none."""
    return whole(pod_id.partition("@dp")[2], RANKS_MAX - 1)


WRITER_BRIDGE: Final = "bridge"
WRITER_STREAMS: Final = "streams"


def streams_writer(version: str) -> str:
    """Return the writer in pod keys of an index version's resolve agents; each version counts clears on its own."""
    return WRITER_STREAMS if version == BASE_VERSION else f"{WRITER_STREAMS}.{version}"


def pod_key(writer: str, pod_id: str) -> bytes:
    """Return the Kafka key of a pod record: ``<writer>|<pod id>``; each writer compacts on its own."""
    return f"{writer}|{pod_id}".encode()
