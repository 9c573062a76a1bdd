"""Errors of the bridge and of the formats every part shares.

::

    KvatlasError                 retriable = False
    ├── SettingsError            a setting is unknown, missing or has a bad value
    │   └── UnresolvedError      a DNS name has no address now (retriable)
    ├── WireError                bytes from an engine or from Kafka are not what they claim to be
    │   ├── LimitError           larger, longer or deeper than the limits allow
    │   └── VersionError         a record of ours with a schema version that is not known here
    ├── EngineError              an engine's socket does not do what its protocol says
    ├── LogError                 Kafka refused or did not answer (retriable)
    ├── RightsError              the account may not do on Kafka what the service needs
    ├── OverloadedError          more is asked for than can be done in time (retriable)
    └── TaskEndedError           a background task that runs for ever has ended (retriable)
"""

from __future__ import annotations

from collections.abc import Iterator


class KvatlasError(Exception):
    """Base of every error that kvatlas raises on purpose.

    Attributes:
        retriable: whether the same call may work when it is made again.
        restart_helps: whether a process that ended by it may do better when it is started again.
    """

    retriable = False
    restart_helps = True


class SettingsError(KvatlasError):
    """A setting is unknown, missing or has a bad value; the text names where it came from."""

    restart_helps = False


class UnresolvedError(SettingsError):
    """A DNS name has no address now: nobody is behind it yet, or it is misspelt."""

    retriable = True
    restart_helps = True


class WireError(KvatlasError):
    """Bytes are not what they claim to be; the text says which field and why."""


class LimitError(WireError):
    """A message is larger, longer or deeper than the limits allow."""


class VersionError(WireError):
    """A record carries a schema version that this build does not know."""


class EngineError(KvatlasError):
    """An engine's socket does not do what its protocol says."""


class LogError(KvatlasError):
    """Kafka refused a request or did not answer in time."""

    retriable = True


class RightsError(KvatlasError):
    """The Kafka account lacks a right; the text names topic or group, and operation where Kafka says it."""

    restart_helps = False


class OverloadedError(KvatlasError):
    """More is asked for than can be done in time, so this was refused at once.

    Attributes:
        retry_seconds: after how long asking again makes sense.
    """

    retriable = True

    def __init__(self, text: str, retry_seconds: float = 1.0) -> None:
        super().__init__(text)
        self.retry_seconds = retry_seconds


class TaskEndedError(KvatlasError):
    """A background task that runs for ever has ended; the text names it."""

    retriable = True


#: What msgspec raises at bytes that are no such value: a wrong UTF-8 is a UnicodeDecodeError and no MsgspecError, and
#: what is nested too deeply is neither.
DECODE_ERRORS = (ValueError, RecursionError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, and so on, each once: one raised again while it is handled may be its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
