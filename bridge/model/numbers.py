"""Numbers and names of our records, with their bounds.

Whatever a record claims, what is computed from its numbers fits 64 bits, and no loop over one is endless.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from kvatlas.bridge.model.epochs import INCARNATION_MAX
from kvatlas.bridge.model.topics import VERSION_NAME

_T = TypeVar("_T")

#: A publisher's counter, or an offset; -1 for none.
Sequence = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 62)]
COUNT_MAX: Final = (1 << 62) - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
#: A wall clock in ns since the epoch.
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
#: 64 bits without a sign, see ``epochs``.
Epoch = Annotated[int, msgspec.Meta(ge=0)]
Incarnation = Annotated[int, msgspec.Meta(ge=0, le=INCARNATION_MAX)]
#: Kafka's; -1 for none.
Partition = Annotated[int, msgspec.Meta(ge=-1, lt=1_000_000)]
Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
#: Numbers of a holder, as wide as its columns.
Byte = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
Short = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Word = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
#: Of an index version; readers keep connections for each.
VersionName = Annotated[str, msgspec.Meta(pattern=VERSION_NAME)]
ByVersion = Annotated[dict[VersionName, _T], msgspec.Meta(max_length=64)]

#: Data-parallel ranks of an engine.
RANKS_MAX: Final = 1024
_DIGITS: Final = 19
_PORT_MAX: Final = 65_535


def whole(text: str, most: int = COUNT_MAX) -> int | None:
    """Return the number that decimal digits say; None for any other text, and for more than ``most``.

    ``int()`` alone refuses thousands of digits with an error of its own, and takes those of all scripts.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        return None
    return number if (number := int(text)) <= most else None


def port_of(text: str) -> int | None:
    """Return the port that decimal digits say, 0 among them; None for any other text."""
    return whole(text, _PORT_MAX)
