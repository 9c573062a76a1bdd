"""Errors of the streams part.

::

    KvatlasError (bridge)
    └── StreamsError            retriable = False
        ├── TopicsError         topics are missing or their partition counts disagree
        ├── StoreError          the local RocksDB state cannot be used
        ├── ChangelogError      a changelog batch was not acknowledged (retriable)
        ├── RestoreError        the changelog could not be read to its end (retriable)
        └── WorkerCrashError         the Faust app died; the service starts a new one (retriable)
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class StreamsError(KvatlasError):
    """Base of what goes wrong in a stream worker."""


class TopicsError(StreamsError):
    """Topics are missing or their partition counts disagree."""


class StoreError(StreamsError):
    """The local RocksDB state cannot be used; the text names the folder and what to do."""


class ChangelogError(StreamsError):
    """A changelog batch was not acknowledged."""

    retriable = True


class RestoreError(StreamsError):
    """The changelog could not be read to its end."""

    retriable = True


class WorkerCrashError(StreamsError):
    """The Faust app died of an error that it could not handle."""

    retriable = True
