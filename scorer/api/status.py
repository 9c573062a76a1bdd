"""What operations need and what errors become on a wire."""

from __future__ import annotations

from typing import Final

import grpc

from kvatlas.bridge.errors import KvatlasError, OverloadedError
from kvatlas.scorer import errors

#: Operation -> role that a bearer token needs for it.
ROLE_OF: Final = {
    "Score": "score",
    "ScoreBatch": "score",
    "Pick": "score",
    "ReportDecision": "score",
    "Explain": "explain",
    "Tokenize": "explain",
    "ListPods": "explain",
    "WatchPods": "explain",
}

_CODES: Final[tuple[tuple[type[KvatlasError], grpc.StatusCode], ...]] = (
    (errors.TooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownPodError, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownRequestError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AuthError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.NotReadyError, grpc.StatusCode.UNAVAILABLE),
)


def code_of(error: KvatlasError) -> grpc.StatusCode:
    """Return the gRPC status code of an error of ours."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.UNAVAILABLE if error.retriable else grpc.StatusCode.INTERNAL
