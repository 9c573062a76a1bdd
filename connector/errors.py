"""Errors of the connector.

::

    KvatlasError (kvatlas.bridge.errors)
    └── ConnectorError                retriable = False
        ├── LayoutError               a directory or header is not what it claims to be, or is not ours
        ├── CapacityError             a budget cannot be met (retriable: eviction frees space)
        ├── ClosedError               used after ``close``
        └── UnsupportedEngineError    the engine found is not one the adapter was checked against

A failed transfer of a block is no exception: it is the block's :class:`kvatlas.connector.outcome.Result`.
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class ConnectorError(KvatlasError):
    """Base of the connector's errors."""


class LayoutError(ConnectorError):
    """A directory, manifest or header is not what it claims to be, or belongs to something else."""


class CapacityError(ConnectorError):
    """A budget cannot be met; the text says which and by how much."""

    retriable = True


class ClosedError(ConnectorError):
    """A part of the connector was used after it was closed."""


class UnsupportedEngineError(ConnectorError):
    """The engine found is not one the adapter was checked against; the text names both."""
