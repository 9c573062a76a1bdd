"""The object tier on a real S3 server: signed requests, multipart uploads, ranges, rights, and a server that dies."""

from __future__ import annotations

import dataclasses
import socket
import threading

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.objects.client import DeniedError, ObjectStoreError, connect
from kvatlas.connector.objects.tier import ObjectTier
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import FINGERPRINT, WAIT, block, key, payload, target
from tests.connector.objects.conftest import S3Server


def loaded(tier: ObjectTier, number: int, size: int) -> tuple[Outcome, bytes]:
    """Load one block and return its outcome and what is in its memory."""
    wanted, memory = target(number, size)
    return tier.load([wanted]).result(WAIT)[wanted.key].outcome, bytes(memory)


@pytest.mark.parametrize("size", [8192, 2 << 20, 12 << 20])
def test_blocks_come_back(s3: S3Server, size: int) -> None:
    """Blocks are stored with one request or as parts, and come back as one answer or as ranges, byte for byte."""
    with ObjectTier(s3.settings(part_bytes=5 << 20, range_bytes=4 << 20), FINGERPRINT) as tier:
        assert {result.outcome for result in tier.store([block(n, size) for n in range(3)]).result(WAIT).values()} == {
            Outcome.STORED
        }
        assert tier.lookup([key(0), key(9)]) == {key(0): True, key(9): False}
        for number in range(3):
            assert loaded(tier, number, size) == (Outcome.LOADED, payload(number, size))
        assert loaded(tier, 9, size)[0] is Outcome.MISS


def test_two_engines_share_a_bucket(s3: S3Server) -> None:
    """What one stored the other finds, verifies, announces, loads and does not store again."""
    settings = s3.settings()
    changes: list[tuple[bool, bytes]] = []
    with (
        ObjectTier(settings, FINGERPRINT) as first,
        ObjectTier(settings, FINGERPRINT, listener=lambda c: changes.append((c.removed, c.keys[0]))) as second,
    ):
        first.store([block(1), block(2)]).result(WAIT)
        assert loaded(second, 1, 8192) == (Outcome.LOADED, payload(1))
        assert second.store([block(2)]).result(WAIT)[key(2)].outcome is Outcome.EXISTS
        first.evict([key(1)])
        assert loaded(second, 1, 8192)[0] is Outcome.MISS
    assert changes == [(False, key(1)), (False, key(2)), (True, key(1))]


def test_bytes_changed_at_the_server_are_a_miss(s3: S3Server) -> None:
    """Damage at rest is found by the checksum, whichever way it is read, and the block is stored anew."""
    settings = s3.settings()
    with ObjectTier(settings, FINGERPRINT) as tier:
        tier.store([block(1)]).result(WAIT)
        objects = connect(settings)
        data = bytearray(objects.get(tier.path(key(1))).body)
        data[9000] ^= 4
        objects.put(tier.path(key(1)), bytes(data), part_bytes=1 << 30)
        assert loaded(tier, 1, 8192)[0] is Outcome.MISS
        assert tier.store([block(1)]).result(WAIT)[key(1)].outcome is Outcome.STORED
        assert loaded(tier, 1, 8192) == (Outcome.LOADED, payload(1))


def test_rights(s3: S3Server) -> None:
    """Who may only read loads and stores nothing; who is nobody is told that it is the rights."""
    settings = s3.settings()
    with ObjectTier(settings, FINGERPRINT) as writer:
        writer.store([block(1)]).result(WAIT)
    reading = dataclasses.replace(settings, store={**settings.store, "access_key_id": "reader"})
    with ObjectTier(reading, FINGERPRINT) as tier:
        assert loaded(tier, 1, 8192) == (Outcome.LOADED, payload(1))
        assert tier.store([block(2)]).result(WAIT)[key(2)].outcome is Outcome.FAILED
        assert tier.read_only
        assert "read-only" in tier.store([block(3)]).result(WAIT)[key(3)].detail
    with pytest.raises(DeniedError):
        connect(dataclasses.replace(settings, store={**settings.store, "access_key_id": "nobody"})).get("x")


def test_listing_names_every_object(s3: S3Server) -> None:
    """What evictors read: every object below a prefix with its size, page by page."""
    objects = connect(s3.settings())
    for number in range(30):
        objects.put(f"a/{number}", bytes(number), part_bytes=1 << 30)
    objects.put("b/0", b"", part_bytes=1 << 30)
    found = {item.path: item.size_bytes for item in objects.list("a")}
    assert found == {f"a/{number}": number for number in range(30)}
    objects.delete(list(found))
    assert not list(objects.list("a"))
    objects.delete(["a/0"])


class Breaking:
    """A proxy on loopback in front of the server that cuts the first connections off."""

    def __init__(self, upstream: int, cut: int) -> None:
        self.cuts = cut
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            if self.cuts > 0:
                self.cuts -= 1
                client.recv(1)
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._upstream))
            self._open.append(server)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()


def test_cut_connections_are_tried_again(s3: S3Server) -> None:
    """Connections that break are made again and the block arrives; without retries it is a failure by name."""
    settings = s3.settings()
    upstream = int(s3.endpoint.rpartition(":")[2])
    proxy = Breaking(upstream, cut=2)
    try:
        store = {**settings.store, "endpoint": f"http://127.0.0.1:{proxy.port}"}
        with ObjectTier(dataclasses.replace(settings, store=store), FINGERPRINT) as tier:
            assert tier.store([block(1)]).result(WAIT)[key(1)].outcome is Outcome.STORED
            assert loaded(tier, 1, 8192) == (Outcome.LOADED, payload(1))
            assert proxy.cuts == 0
        proxy.cuts = 1
        with pytest.raises(ObjectStoreError):
            connect(dataclasses.replace(settings, store=store, retries=0)).get("x")
    finally:
        proxy.close()


def test_a_server_that_is_gone_is_a_failure_soon() -> None:
    """Nobody listens: an engine starts, stores and loads fail by name, and then nothing is asked for a while."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        store = {"endpoint": f"http://127.0.0.1:{nobody.getsockname()[1]}", "region": "x", "access_key_id": "a",
                 "secret_access_key": "b"}  # fmt: skip
        from kvatlas.connector.objects.settings import ObjectTierSettings  # noqa: PLC0415

        settings = ObjectTierSettings(url="s3://b/p", store=store, retries=0, pause_failures=2)
        with ObjectTier(settings, FINGERPRINT) as tier:
            assert loaded(tier, 1, 8192)[0] is Outcome.FAILED
            assert tier.store([block(1)]).result(WAIT)[key(1)].outcome is Outcome.SHED


def test_an_unknown_option_is_refused(s3: S3Server) -> None:
    """An option that the client does not know is named."""
    with pytest.raises(SettingsError, match="colour"):
        connect(s3.settings(store={"colour": "red"}))
