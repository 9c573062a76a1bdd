"""Errors of the scorer.

::

    KvatlasError
    └── ScorerError              retriable = False
        ├── InputError           a request does not say what to score, or says it wrongly
        │   └── TooLargeError    more tokens, bytes, messages or requests than the limits allow
        ├── UnknownModelError    no tokenizer or setting for this model
        ├── UnknownPodError      no pod of this id is known
        ├── UnknownRequestError  no prompt is remembered under this request id
        ├── AuthError            no token, or one that nobody issued
        ├── ForbiddenError       the token's roles do not include this operation
        ├── BusyError            at a limit of what is worked on at once (retriable)
        ├── DeadlineError        the request's deadline passed before there was an answer (retriable)
        └── NotReadyError        pods or workers are not known yet (retriable)
    ClientError                  what a scorer answered to the client, with its gRPC code
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError, OverloadedError


class ScorerError(KvatlasError):
    """Base of what the scorer raises on purpose."""


class InputError(ScorerError):
    """A request does not say what to score, or says it wrongly; names the field."""


class TooLargeError(InputError):
    """A request is larger than the limits allow; names the limit and the setting."""


class UnknownModelError(ScorerError):
    """There is no tokenizer for this model."""


class UnknownPodError(ScorerError):
    """No pod of this id is known."""


class UnknownRequestError(ScorerError):
    """No prompt is remembered under this request id."""


class AuthError(ScorerError):
    """The caller is not known: no bearer token, or one that nobody issued."""


class ForbiddenError(ScorerError):
    """The caller is known and may not do this."""


class BusyError(ScorerError, OverloadedError):
    """The scorer is at a limit of what it works on at once."""

    retriable = True


class DeadlineError(ScorerError):
    """The request's deadline passed before there was an answer."""

    retriable = True


class NotReadyError(ScorerError):
    """Pods or workers are not known yet, so no score would mean anything."""

    retriable = True


class ClientError(KvatlasError):
    """A scorer refused a call or could not be reached.

    Attributes:
        code: name of the gRPC status code, such as ``INVALID_ARGUMENT``.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self._text = text
        self.retriable = code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}

    def at(self, where: str) -> ClientError:
        """Return the same error with the place of the request in its text."""
        return ClientError(self.code, f"{where}: {self._text}")
