"""Errors of reindexing.

::

    KvatlasError (bridge)
    └── ReindexError             a step that would lose answers, or that there is nothing to do for
        └── NotCaughtUpError     the new version cannot take over yet; retriable
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class ReindexError(KvatlasError):
    """A step of a reindex that was refused; the text says what to do first."""

    retriable = False


class NotCaughtUpError(ReindexError):
    """A version is behind the log, or partitions of it have no worker."""

    retriable = True
