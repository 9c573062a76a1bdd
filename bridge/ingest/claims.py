"""Pod claims: whose a message is, and which endpoint may have its pod. Pure.

At most one endpoint forwards a pod, and an endpoint is one engine's, so one pod's. What follows from a name that an
endpoint hears, live, in a reply, or again from the pod that it waits for (the first line that applies counts):

===========================================================  =========================================================
the pod that the endpoint forwards                           ``FOLLOW``: the session's own
another one than the endpoint's, fewer than                  ``FOREIGN``: left out, dead-lettered where it came live
:data:`RENAME_AFTER` times in a row, or at a socket to
which engines connect (they are told apart by their topics)
another bridge owns the pod's partition                      ``WAIT``: subscribed, left out, nothing asked
another endpoint that is still listed has the pod            ``CONFLICT``, said once; ``WAIT`` from then on
another endpoint has it that is listed no longer             ``TAKE_OVER``: goes on where that one stands
nobody has it                                                ``TAKE``: goes on where the log ends, or starts
===========================================================  =========================================================

With any of the last four the pod that the endpoint forwarded before has left it, and is gone.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

#: Messages in a row that name another pod before the endpoint is taken for that pod's.
RENAME_AFTER: Final = 3


class Ruling(enum.Enum):
    """What becomes of a name that an endpoint heard."""

    FOLLOW = enum.auto()
    FOREIGN = enum.auto()
    WAIT = enum.auto()
    CONFLICT = enum.auto()
    TAKE_OVER = enum.auto()
    TAKE = enum.auto()


class Heard(NamedTuple):
    """A pod that was named at an endpoint, and how things stand.

    Attributes:
        pod: the pod that was named.
        ours: the pod that the endpoint forwards, empty for none.
        wanted: the pod that it waits for, empty for none.
        in_a_row: how often this other pod was named in a row, this time included; 0 where it must not count.
        bound: whether engines connect to the endpoint's socket.
        owned: whether this bridge owns the pod's partition.
        held: whether another endpoint has the pod.
        leaving: whether that one is listed no longer.
    """

    pod: str
    ours: str = ""
    wanted: str = ""
    in_a_row: int = 0
    bound: bool = False
    owned: bool = True
    held: bool = False
    leaving: bool = False


def rule(heard: Heard) -> Ruling:
    """Return what the table above says."""
    if heard.pod == heard.ours:
        return Ruling.FOLLOW
    named = heard.ours or heard.wanted
    if named and named != heard.pod and (heard.bound or heard.in_a_row < RENAME_AFTER):
        return Ruling.FOREIGN
    if not heard.owned:
        return Ruling.WAIT
    if heard.held and not heard.leaving:
        return Ruling.WAIT if heard.wanted == heard.pod else Ruling.CONFLICT
    return Ruling.TAKE_OVER if heard.held else Ruling.TAKE


class Strangers:
    """Counts how often in a row one other pod than an endpoint's was named there."""

    __slots__ = ("count", "pod")

    def __init__(self) -> None:
        self.pod, self.count = "", 0

    def named(self, pod: str) -> int:
        """Count a name; returns how often in a row it came."""
        self.count = self.count + 1 if pod == self.pod else 1
        self.pod = pod
        return self.count
