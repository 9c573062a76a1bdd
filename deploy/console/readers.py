"""What a reader of the page may see: asked of the scorer with the reader's own token, so that its roles hold here too.

Decisions, their prefixes, dead letters and texts belong to all tenants: who may not name every salt sees none of them,
or with a salt that the scorer lets it name, the decisions about that salt alone.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb

_CLIENTS: Final = 64
_SEEN_SECONDS: Final = 10.0
_DENIED: Final = ("PERMISSION_DENIED", "UNAUTHENTICATED")
#: Fields that stand beside token ids; whatever else has no token ids is a request's body.
_BESIDE: Final = ("lora", "cache_salt", "pods")


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


class Readers:
    """Scorer clients by token, and what their tokens may see.

    Args:
        connect: makes a client with a token; empty for the console's own.
        clock: monotonic seconds.
    """

    def __init__(self, connect: Callable[[str], ScorerClient], clock: Callable[[], float] = time.monotonic) -> None:
        self._connect = connect
        self._clock = clock
        self._clients: dict[str, ScorerClient] = {}
        self._seen: dict[tuple[str, str | None], tuple[float, bool]] = {}

    async def call(self, reader: Reader, name: str, request: Any) -> Any:
        """Call the scorer as a reader.

        Raises:
            ClientError: the scorer refused it or could not be reached.
        """
        if reader.token not in self._clients:
            if len(self._clients) >= _CLIENTS:
                self._clients.pop(next(iter(self._clients))).close()
            self._clients[reader.token] = self._connect(reader.token)
        return await asyncio.to_thread(self._clients[reader.token].call, name, request)

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
        while len(self._seen) >= _CLIENTS:
            self._seen.pop(next(iter(self._seen)))
        self._seen[reader.token, salt] = (self._clock(), allowed)
        return allowed

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()


def request_of(body: Mapping[str, Any]) -> pb.ScoreRequest:
    """Return the scorer's request for what was asked on the page: token ids, or the body of a request to an engine.

    Raises:
        SettingsError: it is neither, or names no model.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise SettingsError("model is missing")
    given = {name: value for name, value in body.items() if value is not None and name not in ("at", "until")}
    try:
        if "tokens" in given:
            return score_request(
                model, tokens=given["tokens"], **{name: given[name] for name in _BESIDE if given.get(name)}
            )
        if not {"prompt", "messages", "input"} & given.keys():
            raise SettingsError("one of prompt, messages, input and tokens is needed")
        return pb.ScoreRequest(request_json=json.dumps(given))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise SettingsError(f"this is no prompt: {error}") from error
