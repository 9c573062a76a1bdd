"""Offset gaps: records lost in delivery (read again) or deleted from the topic (skipped)."""

from __future__ import annotations

import enum
from typing import Final

_READINGS: Final = 2


class Verdict(enum.Enum):
    """What to do with a record that does not follow the last one."""

    DROP = "drop"
    READ_AGAIN = "read again"
    ACCEPT = "accept"


class OffsetGap:
    """Judges whether records that are missing were lost on their way, or are not in the topic.

    Records of one reading come with rising offsets; one that is not above the last begins another reading. When two
    readings that began where the gap begins have nothing there, retention took the records.
    """

    def __init__(self) -> None:
        self._after = -2
        self._seen = self._first = -1
        self._readings = 0

    def judge(self, last: int, offset: int) -> Verdict:
        """Judge a record.

        Args:
            last: offset of the last record that was taken.
            offset: offset of the one that came, beyond the next.
        """
        if last != self._after:
            self._after, self._seen, self._first, self._readings = last, offset, offset, 0
            return Verdict.READ_AGAIN
        same_reading, self._seen = offset > self._seen, offset
        if same_reading:
            return Verdict.DROP
        self._readings = self._readings + 1 if offset == self._first else 0
        self._first = offset
        return Verdict.ACCEPT if self._readings >= _READINGS else Verdict.READ_AGAIN
