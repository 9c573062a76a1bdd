"""Records of kv-events read into messages."""

from __future__ import annotations

import pytest

from kvatlas.streams.resolve.message import ABSENT, parse_message


def test_headers_become_fields():
    """Every header of the record is read, whatever shape the client gives them in."""
    headers = [
        ("sequence", b"7"),
        ("incarnation", b"3"),
        ("receive_ns", b"99"),
        ("engine", b"sglang"),
        ("model", b"m"),
        ("store", b"s"),
        ("announcements", b"presence"),
        ("content_type", b"keys"),
    ]
    for given in (headers, dict(headers)):
        message = parse_message(b"pod", b"value", given, 2, 5)
        assert (message.pod, message.value, message.sequence, message.incarnation) == ("pod", b"value", 7, 3)
        assert (message.engine, message.model, message.receive_ns) == ("sglang", "m", 99)
        assert (message.store, message.announcements, message.content) == ("s", "presence", "keys")
        assert (message.partition, message.offset, message.error) == (2, 5, "")


def test_defaults_are_vllms_live_stream():
    """Without headers but the sequence a record is an engine's message of an unknown incarnation."""
    message = parse_message(b"pod", None, [("sequence", b"0")])
    assert (message.content, message.engine, message.incarnation, message.value) == ("engine", "vllm", ABSENT, b"")
    assert not message.error


@pytest.mark.parametrize(
    ("key", "headers", "names"),
    [
        (None, {"sequence": b"1"}, "no key"),
        (b"p", {}, "sequence"),
        (b"p", {"sequence": b"one"}, "sequence"),
        (b"p", {"sequence": b"-1"}, "sequence"),
        (b"p", {"sequence": str(1 << 63).encode()}, "sequence"),
        (b"p", {"sequence": b"1", "incarnation": str(1 << 32).encode()}, "incarnation"),
        (b"p", {"sequence": b"1", "receive_ns": b"\xff"}, "receive_ns"),
    ],
)
def test_what_cannot_be_placed_says_why(key, headers, names):
    """Nothing is raised; the message carries the reason."""
    assert names in parse_message(key, b"", headers).error


def test_a_control_record_needs_no_sequence():
    """Control records stand between messages."""
    assert not parse_message(b"p", b"", {"content_type": b"control"}).error
