"""What a reader of the page may see: asked of the scorer with the reader's own token, so that its roles hold here too.

Decisions, their prefixes, dead letters and texts belong to all tenants: who may not name every salt sees none of them,
or with a salt that the scorer lets it name, the decisions about that salt alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.api.bounds import check_name
from kvatlas.scorer.client import AsyncScorerClient, score_request
from kvatlas.scorer.errors import ClientError, InputError

#: Readers whose rights are remembered.
_SEEN: Final = 1_024
_SEEN_SECONDS: Final = 10.0
_DENIED: Final = ("PERMISSION_DENIED", "UNAUTHENTICATED")


class NotForReaderError(KvatlasError):
    """The reader's token at the scorer does not cover what was asked for."""


class Reader(NamedTuple):
    """Who reads, as its request says.

    Attributes:
        token: its bearer token at the scorer; empty for the console's own.
        salt: the salt that it looks for, empty for none.
    """

    token: str
    salt: str

    @classmethod
    def of(cls, token: str, salt: str) -> Reader:
        """Return a reader.

        Raises:
            InputError: token or salt cannot be one.
        """
        check_name(token, "x-scorer-token")
        check_name(salt, "x-cache-salt")
        if not (token.isascii() and (token.isprintable() or not token)):
            raise InputError("x-scorer-token: has characters that no token has")
        return cls(token, salt)


class Readers:
    """The scorer as readers may ask it: over one connection, each call with its reader's token.

    Args:
        connect: makes a client of the scorer with the console's own token.
        clock: monotonic seconds.
    """

    def __init__(self, connect: Callable[[], AsyncScorerClient], clock: Callable[[], float] = time.monotonic) -> None:
        self._connect = connect
        self._clock = clock
        self._client: AsyncScorerClient | None = None
        self._seen: dict[tuple[str, str | None], tuple[float, bool]] = {}

    async def call(self, reader: Reader, name: str, request: Any) -> Any:
        """Call the scorer as a reader.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        if self._client is None:
            self._client = self._connect()
        return await self._client.call(name, request, token=reader.token)

    async def check_all(self, reader: Reader) -> None:
        """See that a reader may see what belongs to all tenants.

        Raises:
            NotForReaderError: it may not.
            ClientError: the scorer could not be asked.
        """
        if not await self._may(reader, None):
            raise NotForReaderError(
                "this belongs to all tenants: the scorer token needs the role explain and every salt"
            )

    async def salt_of(self, reader: Reader) -> str | None:
        """Return the salt that a reader's decisions are limited to, None for those of all.

        Raises:
            NotForReaderError: it may see neither all nor those of its salt.
            ClientError: the scorer could not be asked.
        """
        if not reader.salt and await self._may(reader, None):
            return None
        if reader.salt and await self._may(reader, reader.salt):
            return reader.salt
        raise NotForReaderError(
            "the scorer token needs the role explain and every salt; a tenant's token shows the requests of a salt "
            "that it may name: give the salt beside the token"
        )

    async def _may(self, reader: Reader, salt: str | None) -> bool:
        """Ask the scorer whether a reader may explain a prompt with a salt; None for one that nobody has."""
        known = self._seen.get((reader.token, salt))
        if known is not None and self._clock() - known[0] < _SEEN_SECONDS:
            return known[1]
        # A prompt that is shorter than any block: it is admitted or refused, and nothing is looked up.
        request = score_request(
            "kvatlas-console", tokens=[0], cache_salt=secrets.token_hex(16) if salt is None else salt
        )
        allowed = True
        try:
            await self.call(reader, "Tokenize", request)
        except ClientError as error:
            if error.code not in _DENIED:
                if known is not None:  # what was true before the scorer went away
                    return known[1]
                raise
            allowed = False
        while len(self._seen) >= _SEEN:
            self._seen.pop(next(iter(self._seen)))
        self._seen[reader.token, salt] = (self._clock(), allowed)
        return allowed

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()
