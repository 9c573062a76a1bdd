"""Numbers in text: bounded, in ASCII digits, and never an error that is not ours, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.engines import facts
from kvatlas.bridge.engines.spec import parse_bind, parse_engine
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import COUNT_MAX, port_of, whole
from kvatlas.bridge.model.pod_ids import rank_of, serving_address
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.relay.mooncake import parse_master
from kvatlas.bridge.runtime.telemetry import Telemetry
from kvatlas.deploy.cli.common import token_ids
from kvatlas.deploy.history.moment import parse_moment
from kvatlas.deploy.whatif import policies, routers
from kvatlas.scorer.gateway.discovery import from_pods, parse_endpoint

#: Too many digits for ``int()``, more than any bound, and digits that are none of ours.
TEXTS = ["9" * 5000, "9" * 19, "²", "٣", "-1", "1_0", " 1", ""]
URL = "http://e:8000"


def _short(text: str) -> str:
    return ascii(text) if len(text) < 9 else f"{len(text)} digits"


@given(st.integers(0, 2 * COUNT_MAX), st.integers(0, COUNT_MAX))
def test_digits_are_their_number_up_to_the_bound(number: int, most: int) -> None:
    """Both sides of the bound."""
    assert whole(str(number), most) == (number if number <= most else None)


@given(st.text() | st.text("0123456789²٣ _+-", max_size=8))
def test_any_other_text_is_none(text: str) -> None:
    """What is read is what would be written."""
    assert (found := whole(text)) is None or str(found) == text.lstrip("0") or (found, text.strip("0")) == (0, "")


def test_ports_have_sixteen_bits() -> None:
    assert [port_of(text) for text in ("0", "65535", "65536")] == [0, 65535, None]


#: What reads a number in another's text, and what it makes of one that is none.
OF_OTHERS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "address in a pod's name": (lambda text: serving_address(f"10.0.0.1:{text}"), ""),
    "rank in a pod's name": (lambda text: rank_of(f"pod@dp{text}"), None),
    "endpoint of a pod": (lambda text: from_pods([PodRecord(pod=f"10.0.0.1:{text}", writer="bridge")], 0), []),
    "port of an event socket": (lambda text: facts.reachable(f"tcp://*:{text}", URL), ""),
    "rank of an event socket": (
        lambda text: (
            facts.vllm_facts(
                URL, sources={text: {"endpoint": "tcp://*:1"}}, models=None, version=None, metrics=""
            ).sources
        ),
        (),
    ),
    "block size of a page": (
        lambda text: (
            facts.vllm_facts(
                URL,
                sources=None,
                models=None,
                version=None,
                metrics=f'vllm:cache_config_info{{block_size="{text}"}} 1',
            ).block_size_tokens
        ),
        None,
    ),
}


@pytest.mark.parametrize("text", TEXTS, ids=_short)
@pytest.mark.parametrize("what", OF_OTHERS)
def test_numbers_of_others_are_read_or_left_out(what: str, text: str) -> None:
    """Names and pages come from engines: nothing in them ends who reads them."""
    read, absent = OF_OTHERS[what]
    assert read(text) == absent


GIVEN: dict[str, Callable[[str], Any]] = {
    "engine": lambda text: parse_engine(f"tcp://h:{text}"),
    "ranks of an engine": lambda text: parse_engine(f"tcp://h:1,dp={text}"),
    "blocks of a chunk": lambda text: parse_engine(f"tcp://h:1,blocks_per_chunk={text}"),
    "bind": lambda text: parse_bind(f"tcp://*:{text}"),
    "replay port": lambda text: parse_bind(f"tcp://*:1,replay_port={text}"),
    "parts of a block": lambda text: parse_master(f"tcp://h:1,pod=a,parts={text}"),
    "telemetry": lambda text: Telemetry(f"127.0.0.1:{text}"),
    "endpoint": lambda text: parse_endpoint(f"h:{text}"),
    "ranks of an endpoint": lambda text: parse_endpoint(f"h:1,ranks={text}"),
    "token ids": token_ids,
    "offset": lambda text: parse_moment(f"offset:0:{text}", 0),
    "time ago": lambda text: parse_moment(f"-{text}h", 0),
    "sequence": lambda text: parse_moment(f"seq:{text}", 0, sequences=True),
    "policy": lambda text: policies.parse(f"precise:{text}"),
    "router": lambda text: routers.split(f"kvatlas:{text}"),
}


@pytest.mark.parametrize("text", ["9" * 5000, "²", "٣", "1_0"], ids=_short)
@pytest.mark.parametrize("what", GIVEN)
def test_what_is_no_number_is_an_operators_mistake(what: str, text: str) -> None:
    """The error is ours; a number is taken."""
    GIVEN[what]("1")
    with pytest.raises(SettingsError):
        GIVEN[what](text)


def test_a_moment_is_a_time_that_kafka_takes() -> None:
    """Beyond all records is after the last one; a number that is none is none."""
    assert parse_moment("@1e17", 0).time_ms == 1 << 60
    for text in ("@nan", "@1e400", f"offset:{10**7}:1"):
        with pytest.raises(SettingsError):
            parse_moment(text, 0)
