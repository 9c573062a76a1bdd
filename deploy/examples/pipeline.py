"""The whole pipeline behind a router: stand-in engines, ``kvatlas up``, and ``Pick`` through the gRPC client.

    python -m kvatlas.deploy.examples.pipeline [--requests N]

``kvatlas up`` runs bridge, worker and scorer over a broker inside its own process; with ``--brokers`` over a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import aiohttp

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.examples.engine import StandInEngine
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import AsyncScorerClient, score_request
from kvatlas.scorer.v1 import scorer_pb2 as pb

_MODEL: Final = "demo"
_START_SECONDS: Final = 90.0
_STOP_SECONDS: Final = 30.0


@contextlib.asynccontextmanager
async def pipeline(
    engines: Sequence[StandInEngine], folder: Path, brokers: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[str]:
    """Run ``kvatlas up`` over the engines; gives the scorer's address.

    Raises:
        KvatlasError: it did not get ready; the text ends with its log.
    """
    words = [f"--engine={engine.endpoint}" for engine in engines]
    words += [f"--state-dir={folder / 'state'}", "--scorer-listen=127.0.0.1:0"]
    words += [f"--brokers={brokers}"] if brokers else []
    log = folder / "up.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvatlas.deploy", "up", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)).decode()
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "scorer" not in fields:
            raise KvatlasError(f"kvatlas up said {line!r}:\n{log.read_text(errors='replace')[-2000:]}")
        yield fields["scorer"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def cached_share(pods: int, requests: int, brokers: str = "") -> tuple[float, str]:
    """Send conversations to the pods that the scorer picks.

    Returns:
        Share of prompt tokens that the engines had cached, and the scorer's reason for its last pick.
    """
    engines = [StandInEngine(f"pod-{number}", _MODEL) for number in range(pods)]
    settings = SimPlan(sessions=16, system_prompts=8, system_tokens=512, vocabulary=1000)
    total: Counter[str] = Counter()
    reason = ""
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = await stack.enter_async_context(pipeline(engines, folder, brokers))
        client = await stack.enter_async_context(AsyncScorerClient(address))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        urls = {engine.pod: engine.url for engine in engines}
        turns = 0
        for number, request in enumerate(islice(traffic.requests(settings), requests)):
            wanted = score_request(
                _MODEL, tokens=request.tokens, cache_salt=request.cache_salt, request_id=f"request-{number}"
            )
            if len(await client.list_pods()) < pods:  # an engine is known with its first event: give each one
                pod, turns = engines[turns % pods].pod, turns + 1
            else:
                picked = await client.call("Pick", pb.PickRequest(request=wanted, report=True))
                pod, reason = picked.pod, picked.reason
            body = {"model": _MODEL, "prompt": request.tokens, "max_tokens": 16, "cache_salt": request.cache_salt}
            async with session.post(f"{urls[pod]}/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            total["prompt"] += usage["prompt_tokens"]
            total["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
    return total["cached"] / total["prompt"], reason


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pods", type=int, default=4, help="stand-in engines (default %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="requests sent (default %(default)s)")
    parser.add_argument("--brokers", default="", help="a real Kafka, host:port; default: a broker inside kvatlas up")
    args = parser.parse_args(argv)
    try:
        share, reason = asyncio.run(cached_share(args.pods, args.requests, args.brokers))
    except KvatlasError as error:
        parser.exit(1, f"{error}\n")
    print(f"by the pipeline: {share:.0%} of prompt tokens were cached")
    print(f"last pick: {reason}")


if __name__ == "__main__":
    main()
