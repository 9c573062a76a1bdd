"""Precise, approximate and random routing of the same traffic, each on pods of its own.

    python -m kvatlas.deploy.examples.comparison [--requests N] [--blocks N]

The precise index reads the pods' events. The approximate one is told only where each request was sent, and predicts
the caches from that; it cannot know what answers added or what the pods evicted. Random routing knows nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.pod import Publisher, SimPod
from kvatlas.scorer import Indexer

POLICIES: Final = ("random", "approximate", "precise")
_MODEL: Final = "demo"


def _pods(count: int, blocks: int) -> dict[str, SimPod]:
    def make(name: str) -> SimPod:
        def publisher(live: str, replay: str) -> Publisher:
            return EnginePublisher(live, replay, topic=f"kv@{name}@{_MODEL}", bind=True)

        return SimPod(
            name,
            blocks=blocks,
            block_size_tokens=16,
            model=_MODEL,
            seed=7,
            publisher=publisher,
            clock=time.time,
        )

    return {f"pod-{number}": make(f"pod-{number}") for number in range(count)}


async def cached_share(policy: str, count: int, blocks: int, requests: Sequence[Request]) -> float:
    """Return the share of prompt tokens that the pods had cached under a policy."""
    pods = _pods(count, blocks)
    rng = random.Random(11)  # noqa: S311 - the same draws every time
    for pod in pods.values():
        pod.start()
    try:
        async with Indexer() as indexer:
            for name, pod in pods.items():
                status = pod.status()
                if policy == "precise":
                    await indexer.add_engine(f"{status.endpoint},{status.replay_endpoint}")
                elif policy == "approximate":
                    indexer.add_approximate(name, _MODEL, blocks)
            for request in requests:
                name = await _choose(indexer, request, list(pods), rng, policy)
                pods[name].submit(request)
                pods[name].drain()
                if policy == "approximate":
                    await indexer.note_decision(name, request.tokens, _MODEL, cache_salt=request.cache_salt)
                await _applied(indexer, pods, policy)
    finally:
        for pod in pods.values():
            pod.close()
    hits = sum(pod.counts["hit_tokens"] for pod in pods.values())
    return hits / sum(pod.counts["prompt_tokens"] for pod in pods.values())


async def _choose(indexer: Indexer, request: Request, pods: list[str], rng: random.Random, policy: str) -> str:
    rng.shuffle(pods)
    if policy == "random":
        return pods[0]
    scored = await indexer.score_tokens(request.tokens, _MODEL, cache_salt=request.cache_salt)
    matched = {pod: score.matched_tokens for pod, score in scored.scores.items()}
    return max(pods, key=lambda pod: matched.get(pod, 0))


async def _applied(indexer: Indexer, pods: dict[str, SimPod], policy: str) -> None:
    """Wait for the events of the request, as the milliseconds that a real one takes would."""
    async with asyncio.timeout(10):
        while policy == "precise":
            known = {record.pod: record.last_sequence for record in indexer.pods()}
            if all(known.get(name, -1) == pod.status().sequence for name, pod in pods.items()):
                return
            await asyncio.sleep(0.001)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pods", type=int, default=4, help="simulated pods (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=400, help="blocks of each pod's cache (default %(default)s)")
    parser.add_argument("--requests", type=int, default=400, help="requests of the traffic (default %(default)s)")
    args = parser.parse_args(argv)
    settings = SimPlan(sessions=24, system_prompts=8, system_tokens=512, output_tokens=200)
    requests = list(islice(traffic.requests(settings), args.requests))
    for policy in POLICIES:
        share = asyncio.run(cached_share(policy, args.pods, args.blocks, requests))
        print(f"{policy}: {share:.0%} of prompt tokens were cached", flush=True)


if __name__ == "__main__":
    main()
