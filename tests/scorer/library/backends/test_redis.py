"""What only the Redis backend has to survive: its server going away, other users of the server, refusals."""

import asyncio
import random
import subprocess

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.library.backends.errors import BackendError, IndexLostError
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE
from kvatlas.streams.mirror.layout import token
from kvatlas.streams.mirror.server import MirrorServer
from tests.integration.redis_support import RedisServer

from .test_conformance import EPOCH, holder, key, record


async def test_a_killed_and_restarted_server_loses_nothing_that_was_acknowledged(own_redis):
    """While the server is away the error is retriable; afterwards the same backend goes on."""
    backend = RedisBackend(own_redis.url, retries=1, timeout_seconds=0.5, lookup_seconds=60)
    await backend.start()
    await backend.apply(record(1, 0, [(OP_ADD, key(n), holder(1)) for n in range(3000)]))
    own_redis.kill()
    with pytest.raises(BackendError) as caught:
        await backend.lookup([key(1)])
    assert caught.value.retriable
    own_redis.start()
    assert await backend.lookup([key(1), key(2999)]) == [holder(1)] * 2
    await backend.apply(record(1, 1, [(OP_ADD, key(3000), holder(1))]))
    assert await backend.lookup([key(3000)]) == [holder(1)]
    await backend.close()


async def test_a_value_that_is_no_holders_is_no_answer(own_redis):
    """Other users of the server may write there."""
    backend = RedisBackend(own_redis.url, lookup_seconds=90)
    await backend.start()
    await backend.apply(record(1, 0, [(OP_ADD, key(n), holder(1)) for n in range(2)]))
    await backend._client.append(backend._blocks + key(1), b"x")
    assert await backend.lookup([key(0), key(1), key(2)]) == [holder(1), None, b""]
    await backend.close()


async def test_a_short_outage_is_bridged_by_retries(own_redis):
    """A restart within the retries' patience is not seen by the caller."""
    backend = RedisBackend(own_redis.url, retries=100, lookup_seconds=90)
    await backend.start()
    own_redis.kill()
    asked = asyncio.create_task(backend.lookup([key(1)]))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(own_redis.start)
    assert await asked == [b""]
    await backend.close()


async def test_a_server_that_hangs_holds_no_lookup_up(own_redis):
    """A lookup has a time of its own, however patient updates are; afterwards answers belong to their questions."""
    backend = RedisBackend(own_redis.url, timeout_seconds=600, lookup_seconds=0.3)
    await backend.start()
    await backend.apply(record(1, 0, [(OP_ADD, key(n), holder(1)) for n in range(3000)]))
    own_redis.freeze()
    async with asyncio.timeout(120):
        for keys in ([key(1)], [key(n) for n in range(3000)]):
            with pytest.raises(BackendError) as caught:
                await backend.lookup(keys)
            assert caught.value.retriable
        own_redis.thaw()
        while True:
            try:
                assert await backend.lookup([key(3001), key(1)]) == [b"", holder(1)]
                break
            except BackendError:  # it has only just woken
                continue
    await backend.close()


async def test_prefixes_keep_deployments_apart(redis_server):
    """Two prefixes on one server never see each other, also when one begins like the other."""
    one, two = RedisBackend(redis_server.url, prefix="pre*"), RedisBackend(redis_server.url, prefix="prefix")
    await one.apply(record(1, 0, [(OP_ADD, key(1), holder(1))]))
    await two.apply(record(1, 0, [(OP_ADD, key(1), holder(1))]))
    assert await one.drop_epoch(1, 2**64 - 1) == 1
    assert await one.lookup([key(1)]) == [b""]
    assert await two.lookup([key(1)]) == [holder(1)]
    await one.close()
    await two.close()


async def test_an_acl_user_works_and_a_wrong_password_is_named_without_showing_it(own_redis):
    """The error says where and why, never the secret."""
    admin = RedisBackend(own_redis.url)
    await admin._client.acl_setuser(
        "atlas", enabled=True, passwords=["+s3cret"], keys=["kvatlas:*"], categories=["+@all"]
    )
    await admin.close()
    good = RedisBackend(f"redis://atlas:s3cret@127.0.0.1:{own_redis.port}/0")
    await good.start()
    await good.apply(record(1, 0, [(OP_ADD, key(1), holder(1))]))
    assert await good.lookup([key(1)]) == [holder(1)]
    await good.close()
    bad = RedisBackend(f"redis://atlas:wr0ng@127.0.0.1:{own_redis.port}/0", retries=0)
    with pytest.raises(BackendError) as caught:
        await bad.start()
    assert "wr0ng" not in str(caught.value)
    assert f"127.0.0.1:{own_redis.port}" in str(caught.value)
    await bad.close()


async def test_a_password_from_a_file(own_redis, tmp_path):
    """The address names the user alone; a file that is not there is named."""
    admin = RedisBackend(own_redis.url)
    await admin._client.acl_setuser(
        "atlas", enabled=True, passwords=["+s3cret"], keys=["kvatlas:*"], categories=["+@all"]
    )
    await admin.close()
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    url = f"redis://atlas@127.0.0.1:{own_redis.port}/0"
    backend = RedisBackend(url, password_file=str(secret))
    await backend.start()
    await backend.close()
    with pytest.raises(SettingsError, match="nowhere"):
        RedisBackend(url, password_file="nowhere")


def test_an_address_that_is_none_is_refused():
    """The error says which schemes there are."""
    with pytest.raises(SettingsError, match="rediss://"):
        RedisBackend("http://127.0.0.1:6379")


async def test_a_server_in_any_locale_keeps_the_order_of_bytes(tmp_path):
    """Where letters are ordered as people do, holders, epochs and positions are still ordered as bytes."""
    folder = tmp_path / "locales"
    folder.mkdir()
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "UTF-8", str(folder / "en_US.utf8")], capture_output=True, check=False
    )
    # It warns, and ends with 1, over what the locale leaves out. `make system-deps` brings the sources.
    assert (folder / "en_US.utf8").exists(), made.stderr.decode(errors="replace")[:200]
    server = RedisServer(tmp_path, environment={"LOCPATH": str(folder), "LC_ALL": "en_US.utf8"})
    server.start()
    backend = RedisBackend(server.url)
    try:
        assert await backend._client.eval("return ARGV[1] < ARGV[2] and 1 or 0", 0, b"B", b"a") == 0
        for name, generation in (("a", 66), ("b", 97)):
            taken, _ = await MirrorServer(backend._client, "m").claim(0, token(generation, name))
            assert taken
        rng = random.Random(1)
        pods = [rng.getrandbits(64) for _ in range(60)]
        for pod in pods:
            await backend.apply(record(pod, 66, [(OP_ADD, key(1), holder(pod, epoch=EPOCH + 66))]))
        everybody = b"".join(sorted(holder(pod, epoch=EPOCH + 66) for pod in pods))
        assert await backend.lookup([key(1)]) == [everybody]
        for pod in pods:
            await backend.apply(record(pod, 97, [(OP_ADD, key(1), holder(pod, epoch=EPOCH + 97))]))
        assert await backend.lookup([key(1)]) == [b"".join(sorted(holder(pod, epoch=EPOCH + 97) for pod in pods))]
    finally:
        await backend.close()
        server.kill()


async def test_a_server_that_lost_what_it_acknowledged_is_found_out(own_redis):
    """An emptied server, and one that came back with an older state, take no update and have no answer."""
    backend = RedisBackend(own_redis.url)
    await backend.start()
    await backend.apply(record(1, 0, [(OP_ADD, key(1), holder(1))]))
    older = {name: await backend._client.get(name) for name in await backend._client.keys("kvatlas:v1:*")}
    await backend.apply(record(1, 1, [(OP_REMOVE, key(1), holder(1))]))
    await backend.check()
    for state in ({}, older):
        await backend._client.flushall()
        for name, value in state.items():
            await backend._client.set(name, value)
        with pytest.raises(IndexLostError):
            await backend.check()
        with pytest.raises(IndexLostError):
            await backend.apply(record(1, 2, [(OP_ADD, key(2), holder(1))]))
        assert await backend.lookup([key(2)]) == [None]
        await backend.begin_anew()
        await backend.apply(record(1, 1, [(OP_ADD, key(3), holder(1))]))
        backend.whole()
        assert await backend.lookup([key(1), key(3)]) == [b"", holder(1)]
        await backend.check()
    await backend.close()


async def test_tls_with_a_certificate_that_is_checked(tmp_path):
    """`rediss://` works with the CA's file and is refused without it."""
    key_file, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["-keyout", str(key_file), "-out", str(certificate), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", *made],
        check=True,
        capture_output=True,
    )
    flags = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key_file), "--tls-auth-clients", "no"]
    server = RedisServer(tmp_path, tls=flags)
    server.start()
    try:
        good = RedisBackend(server.url, cafile=str(certificate))
        await good.start()
        await good.apply(record(1, 0, [(OP_ADD, key(1), holder(1))]))
        assert await good.lookup([key(1)]) == [holder(1)]
        await good.close()
        bad = RedisBackend(server.url, retries=0)
        with pytest.raises(BackendError, match="certificate"):
            await bad.start()
        await bad.close()
    finally:
        server.kill()
