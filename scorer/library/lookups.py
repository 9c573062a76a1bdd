"""Lookups in a backend of the library: an index that does not answer gives no answer, as a worker that is away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.options import Source
from kvatlas.scorer.scoring.lookup import Answers

log = logging.getLogger(__name__)


class BackendLookups:
    """Lookups in a backend; raises only for what asking again does not mend."""

    first_blocks = 0

    def __init__(self, backend: Backend, source: Callable[[], Source]) -> None:
        """Take the index.

        Args:
            backend: the index.
            source: returns where its updates come from; raises while there is none.
        """
        self._backend = backend
        self._source = source
        self._away = False

    @property
    def stale(self) -> bool:
        """Whether what the index has only ages: nobody keeps it up to date."""
        return self._source().stale

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:  # noqa: ARG002 - backends have timeouts of their own
        """Look keys up.

        Raises:
            BackendError: the backend cannot be used any more.
        """
        return Answers(await self._found(keys), {})

    async def _found(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        if self._source().rebuilding:
            return [None] * len(keys)
        try:
            found = await self._backend.lookup(keys)
        except BackendError as error:
            if not error.retriable:
                raise
            # No answer is not "nobody holds it", and the score says that it is partial.
            (log.debug if self._away else log.warning)("%s; scores are partial meanwhile", error)
            self._away = True
            return [None] * len(keys)
        self._away = False
        return found
