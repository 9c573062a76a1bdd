"""The pipeline's index mirrored into Redis or Valkey, read by a router that has no connection to the pipeline.

    python -m kvatlas.deploy.examples.mirror [--redis redis://HOST:PORT/0] [--requests N]

``kvatlas up`` runs bridge, worker and scorer over the stand-in engines; its worker mirrors the index. The router asks
the mirror alone. Without ``--redis`` a ``redis-server`` or ``valkey-server`` of this machine is started for the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import aiohttp

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.deploy.examples.engine import StandInEngine
from kvatlas.deploy.examples.pipeline import pipeline
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer import Indexer
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.backends.mirror import MirrorBackend

_MODEL: Final = "demo"
_START_SECONDS: Final = 60.0


@contextlib.asynccontextmanager
async def server(folder: Path) -> AsyncIterator[str]:
    """Run a Redis or Valkey server of this machine on a free port; gives its address.

    Raises:
        SettingsError: there is none.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SettingsError("neither redis-server nor valkey-server is on this machine: give an address with --redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    process = await asyncio.create_subprocess_exec(program, *flags, stdout=asyncio.subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def reader(url: str) -> Indexer:
    """Return a started indexer over the mirror, as soon as a worker has begun one.

    Raises:
        BackendError: not in time.
    """
    deadline = asyncio.get_running_loop().time() + _START_SECONDS
    while True:
        indexer = Indexer.from_mirror(MirrorBackend(url))
        try:
            await indexer.start()
        except BackendError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return indexer


async def cached_share(pods: int, requests: int, redis: str = "") -> float:
    """Send conversations to the pods that score best in the mirror.

    Returns:
        Share of prompt tokens that the engines had cached.
    """
    engines = [StandInEngine(f"pod-{number}", _MODEL) for number in range(pods)]
    settings = SimPlan(sessions=16, system_prompts=8, system_tokens=512, vocabulary=1000)
    total: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = redis or await stack.enter_async_context(server(folder))
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        environment = {**os.environ, "KVATLAS_WORKER_MIRROR": url}
        await stack.enter_async_context(pipeline(engines, folder, "", environment))
        indexer = await reader(url)
        stack.push_async_callback(indexer.stop)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        urls = {engine.pod: engine.url for engine in engines}
        for number, request in enumerate(islice(traffic.requests(settings), requests)):
            scored = await indexer.score_tokens(request.tokens, _MODEL, cache_salt=request.cache_salt)
            pod = scored.best or engines[number % pods].pod
            body = {"model": _MODEL, "prompt": request.tokens, "max_tokens": 16, "cache_salt": request.cache_salt}
            async with session.post(f"{urls[pod]}/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            total["prompt"] += usage["prompt_tokens"]
            total["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
    return total["cached"] / total["prompt"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pods", type=int, default=4, help="stand-in engines (default %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="requests sent (default %(default)s)")
    parser.add_argument(
        "--redis", default="", help="a server of yours, redis:// or rediss://; default: one for the run"
    )
    args = parser.parse_args(argv)
    try:
        share = asyncio.run(cached_share(args.pods, args.requests, args.redis))
    except KvatlasError as error:
        parser.exit(1, f"{error}\n")
    print(f"by the mirror: {share:.0%} of prompt tokens were cached")


if __name__ == "__main__":
    main()
