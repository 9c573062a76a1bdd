"""Cache servers: no pods to send requests to, but pods are credited with what they load from them."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GroupSpec, PodRecord
from kvatlas.scorer.scoring.fleet import Fleet, Weights, meaning
from kvatlas.scorer.scoring.walk import Match, walk
from kvatlas.streams.index.holders import pack_holder

SERVER = "lmcache:s"
TOKENS = 16 * 8 + 1


def _pod(name: str, **fields: Any) -> PodRecord:
    return PodRecord(pod=name, writer="streams", **{"model": "m", "block_size_tokens": 16, **fields})


def _server(**fields: Any) -> PodRecord:
    return PodRecord(pod=SERVER, writer="streams", **{"engine": "lmcache", "serves": ["a", "b"], **fields})


def _holder(pod: str, tier: Tier, epoch: int = 0) -> bytes:
    return pack_holder(pod_ref(pod), 0, tier, 0, 0, epoch)


def _matches(records: list[PodRecord], values: list[bytes]) -> dict[str, Match]:
    scene = Fleet(records, 16).scene("m", Weights())
    found, partial = walk(values, scene, TOKENS)
    assert not partial
    return {match.pod.name: match for match in found}


def test_pods_go_on_from_their_gpu_in_the_server_s_memory() -> None:
    """Also a pod that holds nothing itself; never the server, nor a pod that it does not serve."""
    records = [_pod("a"), _pod("b"), _pod("c"), _server()]
    host = _holder(SERVER, Tier.CPU)
    both = b"".join(sorted([_holder("a", Tier.GPU), host]))
    found = _matches(records, [both] * 2 + [host] * 4 + [b""] * 2)
    assert {name: match.blocks for name, match in found.items()} == {"a": 6, "b": 6}
    assert found["a"].tiers == {"gpu": 2, "cpu": 4}
    assert found["b"].tiers == {"cpu": 6}


def test_every_rank_of_a_pod_loads_from_it() -> None:
    """A pod is listed by its name alone."""
    found = _matches([_pod("a@dp0"), _pod("a@dp1"), _pod("ab"), _server()], [_holder(SERVER, Tier.DISK)] * 3)
    assert {name: match.tiers for name, match in found.items()} == {"a@dp0": {"disk": 3}, "a@dp1": {"disk": 3}}


@pytest.mark.parametrize(
    ("server", "pod", "blocks"),
    [
        ({"valid_from": 6}, {}, 0),  # its epoch ended
        ({"suspect_before": 6}, {}, 3),
        ({"state": "gone"}, {}, 0),
        ({"serves": []}, {}, 0),
        ({}, {"adapters": ["x"]}, 0),  # chunks do not say whose adapter they are of
        ({}, {"model": "other"}, 0),
        ({}, {"valid_from": 9, "suspect_before": 9}, 3),  # the pod restarted, the server did not
        ({}, {"named": True}, 3),  # salts are told
    ],
)
def test_what_counts_is_the_server_s_to_say(server: dict[str, Any], pod: dict[str, Any], blocks: int) -> None:
    """Its own epochs decide, and what its events cannot tell counts for no pod that it matters to."""
    found = _matches([_pod("a", **pod), _server(**server)], [_holder(SERVER, Tier.CPU, 5)] * 3)
    assert sum(match.blocks for match in found.values()) == blocks
    assert all(match.suspect == (3 if server else 0) for match in found.values())


def test_a_pool_counts_as_a_shared_store() -> None:
    """Whatever tier its entries name, since several servers mount it."""
    found = _matches([_pod("a"), _server(store="s3")], [_holder(SERVER, Tier.DISK)] * 3)
    assert found["a"].tiers == {"shared": 3}
    assert found["a"].score == pytest.approx(3 * Weights().shared)


def test_a_hybrid_pod_loads_all_groups() -> None:
    """A chunk is told once every group of it is there."""
    groups = {0: GroupSpec(Kind.FULL, 0, 16), 1: GroupSpec(Kind.SLIDING_WINDOW, 33, 16)}
    found = _matches([_pod("a", groups=groups), _server()], [_holder(SERVER, Tier.CPU)] * 5)
    assert found["a"].blocks == 5


def test_a_change_of_what_it_serves_is_a_change_of_the_fleet() -> None:
    """So that readers build it anew."""
    assert meaning(_server(), 16) != meaning(_server(serves=["a"]), 16)
    assert meaning(_pod("a"), 16) != meaning(_pod("a", adapters=["x"]), 16)
