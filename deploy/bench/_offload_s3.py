"""Object tier beside plain puts and gets of its own client: the same bytes, threads, bucket and requests in flight."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import obstore

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.objects.client import connect
from kvatlas.connector.objects.settings import ObjectTierSettings
from kvatlas.connector.objects.tier import ObjectTier
from kvatlas.deploy.bench._offload_rig import MB, fresh_memory, good, moved, threaded, timed

_SIZES: Final = {"2MB": 2 * MB, "16MB": 16 * MB}
_ORDERS: Final = (("plain-store", "store", "plain-load", "load"), ("store", "plain-store", "load", "plain-load"))


def s3_cases(
    url: str, *, megabytes: int, rounds: int, threads: int, settings: ObjectTierSettings | None = None
) -> Iterator[dict[str, Any]]:
    """Yield ``s3-store`` and ``s3-load`` per block size, in GB/s beside the client's own.

    Args:
        url: where to write; what is written is removed again.
        megabytes: bytes per round and case in MB.
        rounds: rounds, tier and plain in turns.
        threads: requests in flight on either side.
        settings: how to reach the store, in place of the address alone.

    Raises:
        SettingsError: no address was given.
    """
    if settings is None and not url:
        raise SettingsError("bench offload --cases s3: name --url s3://bucket/prefix")
    known = settings or ObjectTierSettings(url=url)
    known = replace(known, url=f"{known.url}/bench-{uuid.uuid4().hex[:12]}", threads=threads, write_threads=threads)
    known = replace(known, queued_write_bytes=2 * megabytes * MB)
    for name, block_bytes in _SIZES.items():
        yield from _one_size(known, name, block_bytes, megabytes * MB, rounds)


def _one_size(
    settings: ObjectTierSettings, name: str, block_bytes: int, size: int, rounds: int
) -> Iterator[dict[str, Any]]:
    memory = fresh_memory(size)
    parts = [memory[at : at + block_bytes] for at in range(0, size, block_bytes)]
    blocks = [BlockBuffers(number.to_bytes(32, "big"), [part]) for number, part in enumerate(parts)]
    fingerprint = Fingerprint(
        engine="bench", engine_version="1", model=f"bench-{name}", hash_algorithm="counter", hash_seed="",
        dtype="int8", block_size_tokens=(16,), layers=(), block_bytes=block_bytes,
    )  # fmt: skip
    store = connect(settings).store

    def put(number: int) -> None:
        obstore.put(store, f"plain/{number}", bytes(parts[number]), use_multipart=False)

    def get(number: int) -> None:
        found = obstore.get(store, f"plain/{number}").bytes()
        parts[number][:] = memoryview(found)

    times: dict[str, list[float]] = {"store": [], "load": [], "plain-store": [], "plain-load": []}
    with ObjectTier(settings, fingerprint) as tier:
        works: dict[str, Callable[[], object]] = {
            "plain-store": lambda: threaded(settings.threads, len(parts), put),
            "store": lambda: good(tier.store(blocks).result()),
            "plain-load": lambda: threaded(settings.threads, len(parts), get),
            "load": lambda: good(tier.load(blocks).result()),
        }
        for number in range(rounds + 1):
            # A store comes after the lookup that did not find the block, in an engine too.
            tier.lookup([block.key for block in blocks])
            for key in _ORDERS[number % 2]:
                seconds = timed(works[key])
                if number:  # the first round warms up
                    times[key].append(seconds)
            tier.evict([block.key for block in blocks])
            obstore.delete(store, [f"plain/{part}" for part in range(len(parts))])
    yield moved(f"s3-store-{name}", times["store"], times["plain-store"], size)
    yield moved(f"s3-load-{name}", times["load"], times["plain-load"], size)
