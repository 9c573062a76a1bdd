"""Bodies of HTTP requests: read within a time by their size, and within a bound on the bytes of all requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import Iterator
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvatlas.scorer.errors import BusyError, DeadlineError, InputError, TooLargeError
from kvatlas.scorer.options import MIB

#: So much of each body is let in without a look at the others, so that small requests pass beside large ones.
_FREE_BYTES: Final = 64 * 1024
#: Of all bodies together; more are refused. Sixteen of the largest: beyond that waiting would only hold memory.
_INFLIGHT_BYTES: Final = 256 * MIB
#: A body must come within so long, and one second more for every MiB of it: slower senders only hold memory.
BODY_SECONDS: Final = 10.0


class Inflight:
    """Counts the bytes of bodies that are being read or worked on, over all fronts; for one event loop.

    Attributes:
        used: bytes counted now.
    """

    def __init__(self, most: int = _INFLIGHT_BYTES) -> None:
        self.used = 0
        self._most = most

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Count bytes while a block runs.

        Raises:
            BusyError: they would be too many.
        """
        counted = max(0, size - _FREE_BYTES)
        self.add(counted)
        try:
            yield
        finally:
            self.used -= counted

    def add(self, count: int) -> None:
        """Count some more bytes; whoever adds takes them off again.

        Raises:
            BusyError: they would be too many.
        """
        if count and self.used + count > self._most:
            raise BusyError(
                f"{self.used} bytes of requests are worked on (max_inflight_bytes = {self._most}); try again"
            )
        self.used += count


class HttpBody:
    """One request's body; a context manager, whose end gives the counted bytes back."""

    def __init__(self, request: web.Request, most_bytes: int, inflight: Inflight, setting: str = "") -> None:
        """Take a request; ``setting`` stands behind the number of bytes in refusals of larger bodies."""
        self._request = request
        self._most = most_bytes
        self._setting = setting
        self._inflight = inflight
        self._counted = 0

    def __enter__(self) -> HttpBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._inflight.used -= self._counted
        self._counted = 0

    async def read(self) -> bytes:
        """Return the whole body.

        Raises:
            TooLargeError: it is larger than it may be.
            DeadlineError: it did not come in time.
            BusyError: bodies of others take the room.
            InputError: its content encoding is not what its header says.
        """
        if (self._request.content_length or 0) > self._most:
            raise self._too_large()
        began = time.monotonic()
        found = bytearray()
        try:
            while True:
                left = began + BODY_SECONDS + len(found) / MIB - time.monotonic()
                async with asyncio.timeout(left):
                    chunk = await self._request.content.readany()
                if not chunk:
                    return await self._plain(bytes(found))
                found += chunk
                if len(found) > self._most:
                    raise self._too_large()
                self._count(len(found))
        except TimeoutError as error:
            raise DeadlineError(
                f"body: {len(found)} bytes came in {time.monotonic() - began:.0f} s, and not its end"
            ) from error
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise InputError(f"body: cannot be read: {error}") from error

    async def _plain(self, body: bytes) -> bytes:
        """Return a body without its content encoding; no more of it is made than a body may have."""
        encoding = self._request.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "deflate"):
            raise InputError(f"body: content encoding {encoding[:40]!r}; plain, gzip and deflate are taken")
        try:
            # Zlib's number for both heads, found by looking.
            found = await asyncio.to_thread(zlib.decompressobj(wbits=47).decompress, body, self._most + 1)
        except zlib.error as error:
            raise InputError(f"body: is not {encoding}, as its header says: {error}") from error
        if len(found) > self._most:
            raise self._too_large()
        self._count(len(body) + len(found))
        return found

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"body: at most {self._most} bytes{self._setting}")

    def _count(self, size: int) -> None:
        more = max(0, size - _FREE_BYTES) - self._counted
        self._inflight.add(more)
        self._counted += more
