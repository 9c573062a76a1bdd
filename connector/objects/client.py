"""S3 requests through obstore: the seam where tests inject faults.

obstore signs, retries and pools connections. This module only narrows it to what the tier needs and turns its
exceptions into two: there is no such object, or the request failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.errors import ConnectorError
from kvatlas.connector.files.blocks import Missing
from kvatlas.connector.objects.settings import ObjectTierSettings, split_url

try:
    import obstore
    from obstore import exceptions
    from obstore.store import S3Store
except ImportError as error:
    raise SettingsError("s3:// needs the package obstore; install kvatlas[s3]") from error


class ObjectStoreError(ConnectorError):
    """A request failed after its retries; the store or the way to it is at fault."""

    retriable = True


class DeniedError(ObjectStoreError):
    """The store refused the request for want of rights."""

    retriable = False


class Fetched(NamedTuple):
    """Bytes of an object and the size of the whole object."""

    body: memoryview
    size_bytes: int


class Listed(NamedTuple):
    """An object as a listing names it."""

    path: str
    size_bytes: int
    modified_ns: int


class Objects(Protocol):
    """Requests the object tier makes. Each may raise :class:`ObjectStoreError`."""

    def get(self, path: str, length: int | None = None) -> Fetched:
        """Return an object's first ``length`` bytes, or all of it.

        Raises:
            Missing: there is none.
        """

    def get_ranges(self, path: str, starts: list[int], lengths: list[int]) -> list[memoryview]:
        """Return several ranges, fetched at once; the object is known to be long enough.

        Raises:
            Missing: there is none.
        """

    def put(self, path: str, body: bytes, *, part_bytes: int) -> None:
        """Store an object whole; as a multipart upload above ``part_bytes``. It appears complete or not at all."""

    def delete(self, paths: list[str]) -> None:
        """Remove objects; those that are gone already are fine."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield the objects below a prefix. For evictors only: a listing is slow and costs."""


def _translated(error: Exception, what: str) -> Exception:
    # obstore's text has the reason in its first line and the same again, in Rust's words, below.
    text = f"{what}: {str(error).partition(chr(10))[0].strip()}"
    if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
        return Missing("no such object")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError | PermissionError):
        return DeniedError(text)
    return ObjectStoreError(text)


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn what obstore raises into :class:`Missing` or :class:`ObjectStoreError`."""
    try:
        yield
    except (exceptions.BaseError, OSError) as error:
        raise _translated(error, what) from error
    except BaseException as error:
        # A panic inside the library is no Exception and would end the thread that asked.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise ObjectStoreError(f"{what}: {error}") from error


class ObstoreObjects:
    """Requests through an obstore store (``S3Store``, or ``MemoryStore`` in tests)."""

    def __init__(self, store: Any) -> None:
        #: obstore's own store.
        self.store = store

    def get(self, path: str, length: int | None = None) -> Fetched:  # noqa: D102 - see Objects
        try:
            with _asking(f"GET {path}"):
                found = obstore.get(self.store, path, options=None if length is None else {"range": (0, length)})
                return Fetched(memoryview(found.bytes()), found.meta["size"])
        except ObjectStoreError as error:
            # No range of an empty object can be asked for: the store is well, and the answer is that object.
            if length is None or "range" not in str(error).lower():
                raise
            with _asking(f"HEAD {path}"):
                if obstore.head(self.store, path)["size"]:
                    raise
            return Fetched(memoryview(b""), 0)

    def get_ranges(self, path: str, starts: list[int], lengths: list[int]) -> list[memoryview]:  # noqa: D102
        with _asking(f"GET {path}"):
            found = obstore.get_ranges(self.store, path, starts=starts, lengths=lengths, coalesce=0)
            return [memoryview(part) for part in found]

    def put(self, path: str, body: bytes, *, part_bytes: int) -> None:  # noqa: D102
        with _asking(f"PUT {path}"):
            obstore.put(self.store, path, body, use_multipart=len(body) > part_bytes, chunk_size=part_bytes)

    def delete(self, paths: list[str]) -> None:  # noqa: D102
        with contextlib.suppress(Missing), _asking(f"DELETE {paths[0]}"):
            obstore.delete(self.store, paths)

    def list(self, prefix: str) -> Iterator[Listed]:  # noqa: D102
        with _asking(f"LIST {prefix}"):
            for chunk in obstore.list(self.store, prefix, chunk_size=1000):
                for meta in chunk:
                    yield Listed(meta["path"], meta["size"], int(meta["last_modified"].timestamp() * 1e9))


def connect(settings: ObjectTierSettings) -> ObstoreObjects:
    """Return the store that the settings name; nothing is asked of it yet.

    Raises:
        SettingsError: an option of ``store`` is not one, or its value is no good.
    """
    bucket, prefix = split_url(settings.url)
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=settings.request_seconds),
        "connect_timeout": timedelta(seconds=settings.connect_seconds),
        "pool_max_idle_per_host": str(settings.threads),
        # Only an endpoint that says http:// itself is spoken to in the clear.
        "allow_http": True,
    }
    try:
        return ObstoreObjects(
            S3Store(
                bucket,
                prefix=prefix or None,
                config=dict(settings.store),  # type: ignore[arg-type]
                client_options=client,  # type: ignore[arg-type]
                retry_config={
                    "max_retries": settings.retries,
                    "retry_timeout": timedelta(seconds=settings.retry_seconds),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=50),
                        "max_backoff": timedelta(seconds=2),
                        "base": 2,
                    },
                },
            )
        )
    except (exceptions.BaseError, TypeError, ValueError) as error:
        raise SettingsError(f"{settings.url}: {str(error).partition(chr(10))[0]}") from error
