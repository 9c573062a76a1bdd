"""Errors of the simulated fleet.

::

    KvatlasError
    └── SimError               retriable = False
        ├── PoolFullError      the cache has too few free blocks now (retriable: blocks come back)
        ├── TraceError         a trace file is missing or not in its format
        └── UnknownPodError    nobody of that name is in the fleet
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class SimError(KvatlasError):
    """Base of what goes wrong in the simulated fleet."""


class PoolFullError(SimError):
    """Too few free blocks; a request that finishes brings some back."""

    retriable = True


class TraceError(SimError):
    """A trace file cannot be read; the text names file, line and reason."""


class UnknownPodError(SimError):
    """No pod of that name is in the fleet."""
