"""Reading a mirror: what a reader believes, when it says partial or stale, and with how few rights it works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.model import block_key, epochs, pod_ids, records
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer import Indexer
from kvatlas.scorer.library.backends.errors import ReadOnlyError, SchemaError
from kvatlas.scorer.library.backends.mirror import MirrorBackend
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, Names, token
from kvatlas.streams.mirror.redis_link import connect

NAMES = Names("mirror")
TOKENS = list(range(16 * 8))
EPOCH = epochs.epoch_of(9)


async def write_pod(client: Any, epoch: int) -> None:
    """Write the pod's record."""
    pod = PodRecord(pod="one", writer="streams", model="m", block_size_tokens=16, epoch=epoch, valid_from=epoch)
    number = pod_ids.pod_partition("one", 2)
    await client.hset(NAMES.pods(number), "one", records.encode(pod))


@pytest.fixture
async def client(own_redis: Any) -> AsyncIterator[Any]:
    """A server with a mirror of two partitions in which pod one holds the prompt."""
    made = connect(own_redis.url)
    layout = MirrorLayout(partitions=2, block_size_tokens=16, index_version="base")
    await made.set(NAMES.layout, msgspec.msgpack.encode(layout))
    for number in range(2):
        await made.set(NAMES.position(number), MirrorPosition(1, 1, 1, 1).pack())
        await made.set(NAMES.claim(number), token(1, "w"))
    for key in block_key.block_keys(block_key.root_key("m"), block_key.pack_tokens(TOKENS), 16):
        await made.set(NAMES.blocks + key, pack_holder(pod_ids.pod_ref("one"), 0, Tier.GPU, 0, 0, EPOCH))
    await write_pod(made, EPOCH)
    yield made
    await made.aclose()


async def score(indexer: Indexer, wait: bool = True) -> Any:
    """Score the prompt after the next poll."""
    polls = indexer.counts["polls"]
    async with asyncio.timeout(60):
        while wait and indexer.counts["polls"] < polls + 2:
            await asyncio.sleep(0.02)
    return await indexer.score_tokens(TOKENS, "m")


async def test_what_is_not_kept_or_not_copied_is_said(client: Any, own_redis: Any):
    """All is well, then a raised epoch, a partition without a claim, and one without a position."""
    async with Indexer.from_mirror(MirrorBackend(own_redis.url, "mirror")) as indexer:
        scored = await score(indexer)
        assert (scored.scores["one"].matched_blocks, scored.partial, scored.stale) == (8, False, False)
        await client.delete(NAMES.claim(1))
        scored = await score(indexer)
        assert (scored.scores["one"].matched_blocks, scored.partial, scored.stale) == (8, False, True)
        await client.delete(NAMES.position(0))
        assert (await score(indexer)).partial
        assert not indexer._running.caught_up
        await write_pod(client, EPOCH + 1)
        assert not (await score(indexer)).scores
        with pytest.raises(ReadOnlyError):
            await indexer.backend.apply(None)


async def test_a_value_that_is_no_holders_is_no_answer(client: Any, own_redis: Any):
    """Other users of the server may write there: the score says that it is partial, and what is before it counts."""
    keys = block_key.block_keys(block_key.root_key("m"), block_key.pack_tokens(TOKENS), 16)
    await client.set(NAMES.blocks + keys[3], b"\xff" * 25)
    async with Indexer.from_mirror(MirrorBackend(own_redis.url, "mirror")) as indexer:
        scored = await score(indexer)
        assert (scored.scores["one"].matched_blocks, scored.partial) == (3, True)


async def test_a_server_that_hangs_holds_no_score_up(client: Any, own_redis: Any):
    """A score does not wait for as long as the server may take: it says that it is partial."""
    mirror = MirrorBackend(own_redis.url, prefix="mirror", timeout_seconds=600, lookup_seconds=0.3)
    async with Indexer.from_mirror(mirror) as indexer:
        own_redis.freeze()
        async with asyncio.timeout(120):
            scored = await indexer.score_tokens(TOKENS, "m")
        assert (scored.partial, scored.scores) == (True, {})
        own_redis.thaw()
        async with asyncio.timeout(60):
            while scored.partial:
                scored = await indexer.score_tokens(TOKENS, "m")
        assert scored.scores["one"].matched_blocks == 8


async def test_a_reader_needs_to_read_alone(client: Any, own_redis: Any, tmp_path: Any):
    """A user that may only read keys of the prefix is enough; the password comes from a file."""
    await client.acl_setuser(
        "reader", enabled=True, passwords=["+s3cret"], keys=["mirror:*"], categories=["+@read", "+@connection"]
    )
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    url = f"redis://reader@127.0.0.1:{own_redis.port}/0"
    async with Indexer.from_mirror(MirrorBackend(url, "mirror", password_file=str(secret))) as indexer:
        assert (await score(indexer)).best == "one"


async def test_a_mirror_of_another_key_version_is_refused(client: Any, own_redis: Any):
    """The error says which version it has."""
    layout = MirrorLayout(partitions=2, block_size_tokens=16, key_version=99, index_version="base")
    await client.set(NAMES.layout, msgspec.msgpack.encode(layout))
    with pytest.raises(SchemaError, match="99"):
        await Indexer.from_mirror(MirrorBackend(own_redis.url, "mirror")).start()
