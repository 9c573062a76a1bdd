"""Errors of the streams part.

::

    KvatlasError (bridge)
    └── StreamsError            retriable = False
        ├── TopicsError         topics are missing or their partition counts disagree
        ├── StoreError          the local RocksDB state cannot be used
        │   ├── StateFolderError  the folder cannot be used before somebody has done something: disk full, no right
        │   └── DamagedError    RocksDB cannot read what it wrote; the next start sets it aside
        ├── ChangelogError      a changelog batch was not acknowledged (retriable)
        ├── FencedError         another worker took a partition over while this one stood still
        ├── GoneError           a partition's local state was closed, it is another worker's now (retriable)
        ├── RestoreError        the changelog could not be read to its end (retriable)
        ├── UncertainError      this worker may have been counted out of its group (retriable)
        └── WorkerCrashError    the Faust app died, and the process with it (retriable)
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class StreamsError(KvatlasError):
    """Base of what goes wrong in a stream worker."""


class TopicsError(StreamsError):
    """Topics are missing or their partition counts disagree."""


class StoreError(StreamsError):
    """The local RocksDB state cannot be used; the text names the folder and what to do."""


class StateFolderError(StoreError):
    """The state folder cannot be used before somebody has done something; the text says what."""

    restart_helps = False


class DamagedError(StoreError):
    """RocksDB cannot read what it wrote; the next start sets the folder aside and reads the changelog instead."""


class ChangelogError(StreamsError):
    """A changelog batch was not acknowledged."""

    retriable = True


class FencedError(StreamsError):
    """Another worker has claimed a partition that this one still took for its own; its process starts anew."""


class GoneError(StreamsError):
    """A partition's local state was closed under whoever still worked on it: it is another worker's now."""

    retriable = True


class RestoreError(StreamsError):
    """The changelog could not be read to its end."""

    retriable = True


class UncertainError(StreamsError):
    """The group has not answered for a session: this worker may have been counted out of it."""

    retriable = True


class WorkerCrashError(StreamsError):
    """The Faust app died of an error that it could not handle."""

    retriable = True
