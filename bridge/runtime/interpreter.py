"""How a process that does one thing all day sets its interpreter; called by whoever owns the process, once it runs."""

from __future__ import annotations

import gc
import sys
from typing import Final

#: Python's own is 5 ms: what a thread has read waits as long for the event loop's thread to let go, several times on
#: the way of one message.
_SWITCH_SECONDS: Final = 0.0005


def tune_interpreter() -> None:
    """Freeze start-up objects and shorten the thread switch interval.

    What a message makes is freed by its reference counts, yet it is looked through again and again: without this
    the slowest hundredth of messages takes half as long again.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
