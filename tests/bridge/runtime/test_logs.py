"""Tests of the log lines of services."""

from __future__ import annotations

import json
import logging

import pytest

from kvatlas.bridge.runtime.logs import Repeats, configure_logging
from kvatlas.bridge.runtime.settings import LogSettings


class Lines:
    """Offers lines to the filter under a clock of its own; keeps what is written."""

    def __init__(self) -> None:
        self.now = 0.0
        self.written: list[str] = []
        self._filter = Repeats(lambda: self.now)

    def say(self, logger: str, text: str, *args: object, level: int = logging.ERROR) -> None:
        record = logging.LogRecord(logger, level, "", 0, text, args, None)
        if self._filter.filter(record):
            self.written.append(record.getMessage())


def test_a_library_that_says_the_same_at_each_try_is_heard_twice_in_ten_seconds() -> None:
    """Lines that differ in their values alone count as one; the next one in time says how many there were."""
    lines = Lines()
    for number in range(200):
        lines.say("aiokafka", "Unable to connect to node %d, try %d of 100%%", 1, number)
        lines.now += 0.06
    assert lines.written == [
        "Unable to connect to node 1, try 0 of 100%",
        "Unable to connect to node 1, try 1 of 100%",
        "Unable to connect to node 1, try 167 of 100% (165 lines like it were left out before)",
        "Unable to connect to node 1, try 168 of 100%",
    ]


def test_our_own_lines_are_left_out_only_in_a_flood() -> None:
    """One line each for fifty pods is no flood; other kinds of lines are not held back by one that is."""
    lines = Lines()
    for number in range(60):
        lines.say("kvatlas.bridge.ingest.stream", "pod %s restarted", number, level=logging.WARNING)
    lines.say("kvatlas.bridge.ingest.stream", "pod %s is gone", 7, level=logging.WARNING)
    assert len(lines.written) == 51
    assert lines.written[-1] == "pod 7 is gone"


def test_debug_lines_are_all_written() -> None:
    """Whoever asks for them wants them."""
    lines = Lines()
    for _ in range(200):
        lines.say("kvatlas.x", "step", level=logging.DEBUG)
    assert len(lines.written) == 200


def test_what_is_remembered_of_lines_is_bounded() -> None:
    """A library that writes values into its lines does not fill the memory."""
    lines = Lines()
    for number in range(10_000):
        lines.say("aiokafka", f"failed {number}")
    assert len(lines.written) == 10_000
    assert len(lines._filter._kinds) <= 1_000


def test_json_lines_say_service_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is one JSON object on standard error."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        configure_logging(LogSettings(format="json"), "bridge")
        logging.getLogger("kvatlas.test").warning("pod %s is %s", "a", "gone")
        line = json.loads(capsys.readouterr().err)
    finally:
        logging.basicConfig(handlers=handlers, level=level, force=True)
    assert (line["service"], line["logger"], line["level"]) == ("bridge", "kvatlas.test", "warning")
    assert line["message"] == "pod a is gone"
