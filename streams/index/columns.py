"""Columns of a lookup's answer: the distinct table values and, per key, which of them it has.

Neighbours on a prompt's walk are mostly held by the same pods as of the same epochs, so their values are equal
bytes and the answer names each value once.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

#: Index entry of a key that nobody holds.
NO_HOLDER: Final = 0
#: Index entry of a key that is not answered here.
NOT_ANSWERED: Final = 0xFFFFFFFF


def answer_columns(
    values: Iterable[bytes | None], unanswered: Sequence[int] = (), at_least: int = 0
) -> tuple[list[bytes], bytes]:
    """Build the ``values`` and ``index`` columns of a ``LookupResponse``.

    Args:
        values: per key its table value, None or empty where nobody holds it.
        unanswered: positions of keys that this worker does not answer.
        at_least: keys in the request, when ``values`` may end early; the rest counts as not answered.

    Returns:
        The distinct values in order of first use, and one little-endian u32 per key: 0 for no holder, ``n`` for
        ``values[n - 1]``, 0xFFFFFFFF for not answered.
    """
    numbers: dict[bytes | None, int] = {None: NO_HOLDER, b"": NO_HOLDER}
    number_of = numbers.setdefault
    index = array("I", [number_of(value, len(numbers) - 1) for value in values])
    if len(index) < at_least:
        index.extend([NOT_ANSWERED] * (at_least - len(index)))
    for position in unanswered:
        index[position] = NOT_ANSWERED
    if sys.byteorder == "big":
        index.byteswap()
    return [value for value in numbers if value], index.tobytes()


def read_index(index: bytes) -> array[int]:
    """Return a response's index column as an array of u32."""
    numbers = array("I", index)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
