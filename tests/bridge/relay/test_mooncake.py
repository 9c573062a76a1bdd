"""Listed masters of Mooncake."""

from __future__ import annotations

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.relay.mooncake import parse_master, parse_masters


def test_a_master_is_read_with_what_names_its_objects() -> None:
    """Without options objects are bare numbers, one a block."""
    spec = parse_master("tcp://m:5557, pod=a, pod=b, key=^([0-9a-f]{16})_, hash=last, parts=4")
    assert (spec.address, spec.pods, spec.pod) == ("tcp://m:5557", ("a", "b"), "mooncake:m:5557")
    assert (spec.names.end, spec.names.parts) == ("last", 4)
    assert parse_master("tcp://m:5557,pod=a").names == (None, "first", 1)


@pytest.mark.parametrize(
    "text",
    [
        "tcp://m:5557",
        "m:5557,pod=a",
        "tcp://m,pod=a",
        "tcp://m:1,pod=",
        "tcp://m:1,pod=a,model=m",
        "tcp://m:1,pod=a,hash=middle",
        "tcp://m:1,pod=a,parts=0",
        "tcp://m:1,pod=a,key=(",
        "tcp://m:1,pod=a,key=[0-9]+",
    ],
)
def test_a_bad_master_is_refused(text: str) -> None:
    """With the text, and what is wrong in it."""
    with pytest.raises(SettingsError, match=r"tcp://m|m:5557"):
        parse_master(text)


def test_a_master_is_listed_once() -> None:
    """Its pool would be two pods of one name."""
    with pytest.raises(SettingsError, match="listed twice"):
        parse_masters(["tcp://m:1,pod=a", "tcp://m:1,pod=b"])
