"""Bounds of what requests name: nothing that is kept, logged or hashed may be of any length.

Every name (model, pod, request id, salt, adapter, policy, ...) is at most 1 KiB of UTF-8 at every front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from kvatlas.scorer.errors import InputError, TooLargeError
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.v1 import scorer_pb2 as pb

MAX_NAME_BYTES: Final = 1024
#: Pods named in one request, loads or weights given with it.
MAX_NAMES: Final = 65_536

#: Requests of a batch, or prompts of one body: more only make the others' turns longer.
MAX_BATCH: Final = requests.MOST_PROMPTS
#: Multimodal items of a prompt, above what any engine takes.
MAX_MULTIMODAL: Final = 4_096
#: Messages of a chat; a template is rendered over all of them.
MAX_MESSAGES: Final = 4_096

_SCORE: Final = ("model", "lora", "cache_salt", "request_id", "strategy", "truncation_side", "request_path")
_REPORT: Final = ("request_id", "pod", "policy")


def check_name(name: str, field: str) -> None:
    """Refuse a name that is too long.

    Raises:
        InputError: it is.
    """
    # Four bytes a character at most, so most names need no encoding to know.
    if len(name) * 4 > MAX_NAME_BYTES and len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise InputError(f"{field}: at most {MAX_NAME_BYTES} bytes, this has {len(name)} characters")


def check_names(names: Iterable[str], count: int, field: str) -> None:
    """Refuse too many names, or one that is too long.

    Raises:
        TooLargeError: there are too many.
        InputError: one is too long.
    """
    if count > MAX_NAMES:
        raise TooLargeError(f"{field}: at most {MAX_NAMES}, these are {count}")
    for name in names:
        check_name(name, field)


def check_request(request: Any) -> None:
    """Check every name in a request of any operation, but for the requests in a batch.

    Raises:
        InputError: a name is too long, or there are too many.
    """
    if isinstance(request, pb.ScoreRequest):
        _check_score(request)
    elif isinstance(request, pb.PickRequest):
        _check_score(request.request)
        check_name(request.tie_break, "tie_break")
        check_names(request.load, len(request.load), "load")
        check_names(request.weights, len(request.weights), "weights")
    elif isinstance(request, pb.ReportDecisionRequest):
        _check_fields(request, _REPORT)
        _check_score(request.request)
    elif isinstance(request, pb.ListPodsRequest):
        check_name(request.model, "model")


def check_batch(request: pb.ScoreBatchRequest) -> None:
    """Refuse a batch of too many requests.

    Raises:
        TooLargeError: it is one.
    """
    if len(request.requests) > MAX_BATCH:
        raise TooLargeError(f"{len(request.requests)} requests; at most {MAX_BATCH}")


def _check_score(request: pb.ScoreRequest) -> None:
    _check_fields(request, _SCORE)
    check_names(request.pods, len(request.pods), "pods")
    count = len(request.multimodal)
    if count > MAX_MULTIMODAL:
        raise TooLargeError(f"multimodal: {count} items; at most {MAX_MULTIMODAL}")
    for item in request.multimodal:
        check_name(item.identifier, "multimodal.identifier")


def _check_fields(request: Any, fields: Sequence[str]) -> None:
    for field in fields:
        check_name(getattr(request, field), field)
