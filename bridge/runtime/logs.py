"""Log lines of every service: their form, and how often one is said."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.runtime.settings import LogSettings

_SECONDS: Final = 10.0
#: Lines of one kind in that time: of our own, and of client libraries, which say the same at each of their tries.
_OWN_LINES: Final = 50
_FOREIGN_LINES: Final = 2
_KINDS: Final = 1_000


def whereabouts(error: BaseException) -> str:
    """Return an error's kind and where it came up, without its text, which may hold what was worked on: prompts."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return " < ".join((type(error).__name__, *places))


class _Said:
    """How often lines of one kind came since a time."""

    __slots__ = ("began", "left_out", "lines")

    def __init__(self, began: float) -> None:
        self.began, self.lines, self.left_out = began, 1, 0


class Repeats(logging.Filter):
    """Rate-limits log lines with the same format string.

    A broker that is away, or an engine that sends garbage, would else fill the disk with hundreds of lines a second.
    The next line of the kind says how many were left out. Lines below ``info`` are all written.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], _Said] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is written."""
        if record.levelno < logging.INFO:
            return True
        now, kind = self._clock(), (record.name, record.levelno, str(record.msg))
        said = self._kinds.get(kind)
        if said is None or now - said.began >= _SECONDS:
            self._begin(kind, now)
            if said is not None and said.left_out:
                record.msg = f"{record.msg} ({said.left_out} lines like it were left out before)"
            return True
        if said.lines < (_OWN_LINES if record.name.startswith("kvatlas") else _FOREIGN_LINES):
            said.lines += 1
            return True
        said.left_out += 1
        return False

    def _begin(self, kind: tuple[str, int, str], now: float) -> None:
        if len(self._kinds) >= _KINDS:
            self._kinds = {other: said for other, said in self._kinds.items() if now - said.began < _SECONDS}
        if len(self._kinds) >= _KINDS:  # of a library that writes values into its lines
            self._kinds.clear()
        self._kinds[kind] = _Said(now)


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_utc(record)} {record.levelname.lower():7} {self._service} {record.name}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _utc(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def configure_logging(settings: LogSettings, service: str) -> None:
    """Send log lines of this process to standard error; calling it again replaces what was set.

    Client libraries are kept at warning or above: their info lines repeat what our metrics say. Of lines that differ in
    their values alone, only so many are written, see :class:`Repeats`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Repeats())
    handler.setFormatter(_JsonFormatter(service) if settings.format == "json" else _TextFormatter(service))
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("aiokafka", "kafka", "faust", "mode", "kubernetes", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
