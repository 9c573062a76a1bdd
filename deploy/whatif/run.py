"""Run arrivals through a policy on a modelled fleet and sum up what came of it."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.sim.traffic import TraceLine
from kvatlas.deploy.whatif.fleet import Arrival, Pod
from kvatlas.deploy.whatif.policies import SHARED, Options, make, parse

#: Share of the fleet's prefill rate that the recorded load takes when no rate is given.
_UTILISATION: Final = 0.9


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy made of the arrivals.

    Attributes:
        policy: its name as given.
        requests: arrivals served.
        hit_ratio: prompt blocks found in the chosen pod's cache, 0 to 1.
        balance: prompt blocks of the busiest pod over the mean; 1 is even.
        recomputed_tokens: prompt tokens that had to be computed.
    """

    policy: str
    requests: int
    hit_ratio: float
    balance: float
    recomputed_tokens: int


def read_trace(path: Path, block_size_tokens: int) -> Iterator[Arrival]:
    """Yield the requests of a trace file (JSON lines, gzip when the name ends so).

    Raises:
        SettingsError: the file cannot be read, or a line is not a request; names the line.
    """
    decoder = msgspec.json.Decoder(TraceLine)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    request = decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise SettingsError(f"{path} line {number}: {error}") from error
                output = request.output_length // block_size_tokens
                yield Arrival(
                    request.timestamp, request.hash_ids, output, "", request.input_length, request.output_length
                )
    except OSError as error:
        raise SettingsError(f"cannot read trace {path}: {error}") from error


def prefill_rate(arrivals: Sequence[Arrival], pods: int) -> float:
    """Return blocks per second and pod at which the recorded load keeps the fleet 90 % busy without any hit."""
    blocks = sum(len(arrival.blocks) for arrival in arrivals)
    seconds = max((arrivals[-1].time_ms - arrivals[0].time_ms) / 1000, 1.0) if arrivals else 1.0
    return blocks * _UTILISATION / seconds / pods


def simulate(
    arrivals: Sequence[Arrival],
    policy: str,
    *,
    pods: int,
    capacity_blocks: int,
    block_size_tokens: int,
    options: Options,
    blocks_per_second: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Run all arrivals, in order, through one policy.

    Args:
        arrivals: requests in order of time.
        policy: ``KIND`` or ``KIND:N``.
        pods: pods in the fleet.
        capacity_blocks: blocks that one pod's cache holds.
        block_size_tokens: tokens per block of the arrivals.
        options: knobs of the policies.
        blocks_per_second: prefill rate of one pod; None takes :func:`prefill_rate`.
        progress: called with the number of requests done, now and then.

    Raises:
        SettingsError: the policy's name is not known.
    """
    shared = parse(policy)[0] == SHARED
    rate = blocks_per_second or prefill_rate(arrivals, pods)
    fleet = [Pod(capacity_blocks * pods, rate * pods)] if shared else [Pod(capacity_blocks, rate) for _ in range(pods)]
    decider = make(policy, len(fleet), capacity_blocks, options)
    for number, arrival in enumerate(arrivals, start=1):
        chosen = decider.choose(arrival, fleet)
        decider.served(arrival, chosen, fleet[chosen].serve(arrival))
        if progress and number % 1000 == 0:
            progress(number)
    return _sum_up(policy, fleet, block_size_tokens)


def _sum_up(policy: str, fleet: Iterable[Pod], block_size_tokens: int) -> Outcome:
    served = [pod.served_blocks for pod in fleet]
    total, hit = sum(served), sum(pod.hit_blocks for pod in fleet)
    return Outcome(
        policy=policy,
        requests=sum(pod.requests for pod in fleet),
        hit_ratio=hit / total if total else 0.0,
        balance=max(served) * len(served) / total if total else 1.0,
        recomputed_tokens=(total - hit) * block_size_tokens,
    )
