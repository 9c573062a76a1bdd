"""Policies side by side over the same requests: hit ratios, and times to first token in a fleet with queues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvatlas.deploy.whatif.policies import Options
from kvatlas.deploy.whatif.queueing import Engine, FirstTokens, Request, Simulation, at_load, requests_of, sum_up
from kvatlas.deploy.whatif.recorded import Recording
from kvatlas.deploy.whatif.routers import Knobs, router, split
from kvatlas.deploy.whatif.run import Outcome, simulate
from kvatlas.scorer.gateway.options import PickerSettings

#: Share of the fleet's time that recorded requests take.
_LOAD: Final = 0.8


class QueuedFleet(NamedTuple):
    """The fleet of the queueing model.

    Attributes:
        engine: figures of one pod.
        pods: how many.
        seed: of the random choices.
        event_seconds: age of what is known of caches.
    """

    engine: Engine
    pods: int
    seed: int = 1
    event_seconds: float = 0.03


def hit_ratios(found: Recording, policies: Sequence[str], capacity_blocks: int) -> Iterator[Outcome]:
    """Yield what really happened, where the outcomes tell, then each policy's outcome.

    Raises:
        SettingsError: there is no policy of a name.
    """
    if found.observed is not None:
        yield found.observed
    for policy in policies:
        yield simulate(
            found.arrivals,
            policy,
            pods=len(found.pods),
            capacity_blocks=capacity_blocks,
            block_size_tokens=found.block_size_tokens,
            options=Options(),
        )


def first_tokens(
    requests: Sequence[Request], fleet: QueuedFleet, policies: Sequence[tuple[str, int]], settings: PickerSettings
) -> Iterator[FirstTokens]:
    """Yield each policy's times to first token; a policy is a kind and its replicas."""
    for kind, replicas in policies:
        knobs = Knobs(
            fleet.engine,
            fleet.pods,
            replicas=replicas,
            seed=fleet.seed,
            weights=settings.weights(),
            rules=settings.rules(),
            load_tokens_per_second=settings.tokens_per_second,
        )
        simulation = Simulation(fleet.engine, fleet.pods, event_seconds=fleet.event_seconds)
        yield sum_up(kind, replicas, simulation.run(requests, router(kind, knobs)))


def recorded_first_tokens(
    found: Recording, policies: Sequence[str], capacity_blocks: int, settings: PickerSettings
) -> Iterator[FirstTokens]:
    """Yield each policy's times to first token over recorded requests, on engines of the usual figures.

    Raises:
        SettingsError: there is no policy of a name.
    """
    chosen = [split(name) for name in policies]
    engine = Engine(
        tokens_per_second=8_000.0,
        step_seconds=0.02,
        capacity_blocks=capacity_blocks,
        block_tokens=found.block_size_tokens,
    )
    fleet = QueuedFleet(engine, len(found.pods))
    requests = at_load(requests_of(found.arrivals, found.block_size_tokens), engine, fleet.pods, _LOAD)
    yield from first_tokens(requests, fleet, chosen, settings)
