"""Pods that the log knows and nobody has heard since."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.model import epochs, records

_HERE = "tcp://127.0.0.1:1"


def _know(bridge: Any, pod: str, endpoint: str, **changes: Any) -> None:
    record = records.PodRecord(pod=pod, writer="bridge", endpoint=endpoint, epoch=epochs.epoch_of(5), **changes)
    bridge.shared.recovered[pod] = Recovered(record)


async def test_what_left_while_no_bridge_ran_is_gone(bridge: Any) -> None:
    """A pod nobody lists is gone after the limit, once, under a raised epoch that a later stream goes on from."""
    shared = bridge.change(gone_seconds=30.0, stale_seconds=60.0)
    _know(bridge, "left", "tcp://there:1", engine="vllm", model="m")
    bridge.streams.expire(100.0)
    bridge.streams.expire(129.0)
    assert bridge.log.records == []
    for now in (130.0, 200.0):
        bridge.streams.expire(now)
    assert [control.type for control in bridge.log.controls("left")] == ["gone"]
    record = bridge.log.pod("left")
    assert (record.state, record.valid_from) == (records.GONE, record.epoch)
    assert record.epoch > epochs.epoch_of(5)
    assert shared.recovered["left"].position().incarnation == epochs.incarnation_of(record.epoch)


async def test_what_is_listed_and_silent_is_stale(bridge: Any) -> None:
    """A pod whose endpoint is listed is only stale, however long it is silent."""
    bridge.change(gone_seconds=30.0, stale_seconds=60.0)
    _know(bridge, "silent", bridge.open(parse_engine(_HERE)[0]).spec.key)
    for now in (0.0, 59.0):
        bridge.streams.expire(now)
    assert bridge.log.records == []
    for now in (60.0, 9000.0):
        bridge.streams.expire(now)
    assert len(bridge.log.records) == 1
    assert bridge.log.pod("silent").state == records.STALE


async def test_a_bridge_that_takes_every_pod_ends_none_that_it_never_heard(bridge: Any) -> None:
    """With ownership=all another bridge may list the pod, so it is stale and its epoch stays."""
    bridge.change(ownership="all", gone_seconds=30.0)
    _know(bridge, "left", "tcp://there:1")
    bridge.streams.expire(0.0)
    bridge.streams.expire(31.0)
    record = bridge.log.pod("left")
    assert (record.state, record.epoch) == (records.STALE, epochs.epoch_of(5))
    assert bridge.log.controls("left") == []


@pytest.mark.parametrize("kind", ["gone", "not ours", "heard"])
async def test_pods_that_are_settled_are_left_alone(bridge: Any, kind: str) -> None:
    """Pods that are gone already, that another bridge owns, or that were heard meanwhile are not judged."""
    shared = bridge.shared
    _know(bridge, "pod", "", state=records.GONE if kind == "gone" else records.LIVE)
    shared.owns = lambda _: kind != "not ours"
    bridge.streams.expire(0.0)
    if kind == "heard":
        del shared.recovered["pod"]
        bridge.streams.expire(1.0)
        _know(bridge, "pod", "")
        bridge.streams.expire(20.0)
    bridge.streams.expire(45.0)
    assert bridge.log.records == []
