"""Capture files: a stretch of the log in one compressed file.

gzip over msgpack values, each behind its length as 4 big-endian bytes. The first value is a header map, each further
one an array, one per record::

    {"format": "kvatlas-capture", "v": 1, "created_ns": 1795464237000000000, "brokers": "..."}
    [topic, partition, offset, timestamp_ms, key or nil, value or nil, [[header, value], ...]]

The topic is named without the deployment's prefix. Records keep the order in which they were saved.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, SettingsError, WireError
from kvatlas.bridge.model import topics
from kvatlas.deploy.history.log import Record

FORMAT: Final = "kvatlas-capture"
VERSION: Final = 1
_LENGTH_BYTES: Final = 4
_encoder: Final = msgspec.msgpack.Encoder()


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First value of a capture."""

    format: str = FORMAT
    v: int = VERSION
    created_ns: int = 0
    brokers: str = ""


class CaptureWriter:
    """Writes a capture; use as ``with``. The file appears under its name only when it is complete."""

    def __init__(self, path: Path, created_ns: int, brokers: str = "") -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = gzip.open(self._partial, "wb", compresslevel=4)  # noqa: SIM115 - closed in __exit__
        self.records = 0
        self._append(_encoder.encode(Header(created_ns=created_ns, brokers=brokers)))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def write(self, record: Record) -> None:
        """Append one record."""
        self._append(_encoder.encode(record))
        self.records += 1

    def _append(self, value: bytes) -> None:
        self._file.write(len(value).to_bytes(_LENGTH_BYTES, "big") + value)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file and give it its name; a failed capture leaves no file of that name."""
        try:
            self._file.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def capture_topic(path: Path) -> str:
    """Return the topic of a capture's first record; ``kv-events`` for an empty one.

    Raises:
        WireError: as :func:`read_capture`.
    """
    return next((record.topic for record in read_capture(path)), topics.EVENTS)


_Row = tuple[str, int, int, int, bytes | None, bytes | None, list[tuple[str, bytes]]]


def read_capture(path: Path) -> Iterator[Record]:
    """Yield the records of a capture.

    Raises:
        SettingsError: the file is not there or may not be read.
        WireError: it is no capture, is of another version, or is cut short; says after which record.
    """
    number = 0
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(f"capture {path} cannot be read: {error.strerror}") from error
    try:
        with gzip.open(path, "rb") as file:
            values = _values(file)
            header = msgspec.msgpack.decode(next(values, b""), type=Header)
            if header.format != FORMAT or header.v != VERSION:
                raise WireError(
                    f"{path}: a {header.format!r} of version {header.v}; this build reads {FORMAT} {VERSION}"
                )
            for value in values:
                row: _Row = msgspec.msgpack.decode(value, type=_Row)
                yield Record(*row[:6], headers=tuple(row[6]))
                number += 1
    except (OSError, EOFError, zlib.error, *DECODE_ERRORS) as error:
        raise WireError(f"{path}: not a complete capture, after record {number}: {error}") from error


def _values(file: gzip.GzipFile) -> Iterator[bytes]:
    while length := file.read(_LENGTH_BYTES):
        size = int.from_bytes(length, "big")
        value = file.read(size)
        if len(length) < _LENGTH_BYTES or len(value) < size:
            raise EOFError("cut short")
        yield value
