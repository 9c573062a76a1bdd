"""Errors of the index backends.

::

    ScorerError
    └── BackendError             the index does not answer or cannot be opened (retriable)
        ├── SchemaError          a store holds another schema version than this build writes
        ├── IndexLostError       a server has lost what it had acknowledged
        └── ReadOnlyError        an index that others keep was to be written
"""

from __future__ import annotations

from kvatlas.scorer.errors import ScorerError


class BackendError(ScorerError):
    """An index backend does not answer or cannot be opened; the text says which and why."""

    retriable = True


class SchemaError(BackendError):
    """A shared store holds entries of another schema version."""

    retriable = False


class IndexLostError(BackendError):
    """An index has lost what it had acknowledged: it has to be written anew before anything goes on."""

    retriable = False


class ReadOnlyError(BackendError):
    """An index that others keep was to be written."""

    retriable = False
