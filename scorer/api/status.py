"""What operations need and what errors become on a wire."""

from __future__ import annotations

import math
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

#: Name of a gRPC status code -> HTTP status.
HTTP_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


def http_status(error: KvatlasError) -> int:
    """Return the HTTP status of an error of ours."""
    return 413 if isinstance(error, errors.TooLargeError) else HTTP_STATUS.get(code_of(error).name, 500)


def retry_headers(error: KvatlasError) -> dict[str, str] | None:
    """Return the HTTP headers that say when to ask again, where that makes sense."""
    return {"Retry-After": str(math.ceil(error.retry_seconds))} if isinstance(error, OverloadedError) else None


def code_of(error: KvatlasError) -> grpc.StatusCode:
    """Return the gRPC status code of an error of ours."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.UNAVAILABLE if error.retriable else grpc.StatusCode.INTERNAL
