"""Requests as a picker sees them, and its decisions about them. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Incoming(NamedTuple):
    """One HTTP request at the gateway.

    Attributes:
        headers: by name in lower case, ``:path`` and ``:method`` among them.
        body: the whole body; None where none is sent to the picker.
        subset: addresses to choose among, None where the gateway gives no hint.
        request_id: of the client or the gateway, empty for none.
        whole: whether the body is all there is; of one that is too long for its buffer a gateway shows the beginning.
    """

    headers: Mapping[str, str]
    body: bytes | None
    subset: frozenset[str] | None
    request_id: str
    whole: bool = True


class Destination(NamedTuple):
    """Where a request goes.

    Attributes:
        addresses: ``ip:port``, best first; empty leaves the choice to the gateway.
        headers: further headers to set.
        body: a changed body; None leaves it as it came.
        request_id: the id that the decision is known by.
    """

    addresses: tuple[str, ...]
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    request_id: str = ""


class Refusal(NamedTuple):
    """An answer of ours in the pod's place.

    Attributes:
        status: HTTP status.
        text: what to tell the client.
        reason: one word for header, access log and metrics.
    """

    status: int
    text: str
    reason: str


Decision = Destination | Refusal
