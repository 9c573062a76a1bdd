"""Refusals of rights are found in errors, however the client says them."""

from __future__ import annotations

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError

from kvatlas.bridge.errors import causes
from kvatlas.bridge.kafka.rights import lost_right, refusal_in
from kvatlas.bridge.runtime.settings import KafkaSettings


@pytest.mark.parametrize("kind", [TopicAuthorizationFailedError, GroupAuthorizationFailedError])
def test_a_refusal_is_found_as_itself_as_a_cause_and_as_text(kind: type[KafkaError]) -> None:
    """Aiokafka puts what it does not expect of a fetch of offsets into the text of a bare error."""
    for error in (kind("name"), KafkaError(repr(kind()))):
        wrapped = RuntimeError("died")
        wrapped.__cause__ = error
        assert isinstance(refusal_in(error), kind)
        assert isinstance(refusal_in(wrapped), kind)
        assert lost_right(wrapped, KafkaSettings(brokers="h:1")) is not None


def test_other_errors_are_no_refusals() -> None:
    """Also one that only speaks of rights."""
    assert refusal_in(KafkaError("NotCoordinatorForGroupError()")) is None
    assert refusal_in(RuntimeError("TopicAuthorizationFailedError()")) is None
    assert refusal_in(None) is None


def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    """A client's close raises again what ended it, which is then cause and context of one error: no endless walk."""
    first, second = KeyError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    assert list(causes(first)) == [first, second]
    assert lost_right(first, KafkaSettings()) is None
