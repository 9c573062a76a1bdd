"""What can be found out about a request within the deadline: its body, who holds its prompt, and what is missing."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, NamedTuple

from kvatlas.bridge.errors import KvatlasError, OverloadedError
from kvatlas.bridge.runtime.logs import whereabouts
from kvatlas.scorer.errors import DeadlineError, InputError, NotReadyError, TooLargeError, UnknownModelError
from kvatlas.scorer.gateway.body import Body, read_body
from kvatlas.scorer.gateway.prefixes import Prefixes, Prompt
from kvatlas.scorer.picker.route import Incoming
from kvatlas.scorer.tokenization.requests import Shape, shape_of

log = logging.getLogger(__name__)

_SCORER_SHARE: Final = 0.8
UNREADABLE: Final = "unreadable"
#: What a prompt that was not scored is called, by the error; the first that fits.
_CAUSES: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (TimeoutError, "deadline"),
    (DeadlineError, "deadline"),
    (InputError, UNREADABLE),
    (TooLargeError, UNREADABLE),
    (UnknownModelError, "no-tokenizer"),
    (NotReadyError, "index"),
    (OverloadedError, "overloaded"),
    (KvatlasError, "scorer"),
)


class Known(NamedTuple):
    """What was found out about a request.

    Attributes:
        body: decoded, None where there is none or it cannot be read.
        prompt: scored, None where that failed.
        degraded: why it was not, empty when it was or when there is no prompt.
        inference: whether the request has a prompt that an engine will compute.
    """

    body: Body | None
    prompt: Prompt | None
    degraded: str
    inference: bool


class Looker:
    """Finds out about requests.

    Args:
        prefixes: answers who holds a prompt; None for nobody.
        deadline_seconds: for tokenizing and scoring.
    """

    def __init__(self, prefixes: Prefixes | None, deadline_seconds: float) -> None:
        self._prefixes = prefixes
        self._seconds = deadline_seconds

    async def look(self, incoming: Incoming) -> Known:
        """Find out about a request; never later than the deadline, by as much as the event loop is late."""
        shape = shape_of(incoming.headers.get(":path", ""))
        if shape is None or not incoming.body:
            return Known(None, None, "no-body" if shape is not None else "", shape is not None)
        body = read_body(incoming.body)
        if body is None:
            return Known(None, None, UNREADABLE, inference=True)
        prompt, degraded = await self._scored(shape, body, incoming.body)
        if prompt is None and self._prefixes is not None:
            body = body._replace(model=self._prefixes.named(body.model))
        return Known(body, prompt, degraded, inference=True)

    async def _scored(self, shape: Shape, body: Body, data: bytes) -> tuple[Prompt | None, str]:
        if self._prefixes is None:
            return None, "no-index"
        # The scorer gets less: what it has found in that time, partial as it is, beats load alone.
        until = time.monotonic() + self._seconds * _SCORER_SHARE
        try:
            async with asyncio.timeout(self._seconds):
                return await self._prefixes.of(shape, data if body.document is None else body.document, until), ""
        except (KvatlasError, TimeoutError) as error:
            return None, next(cause for kind, cause in _CAUSES if isinstance(error, kind))
        except Exception as error:  # noqa: BLE001 - load alone still decides; the text may hold a prompt
            log.error("a prompt was not scored: %s", whereabouts(error))
            return None, "fault"
