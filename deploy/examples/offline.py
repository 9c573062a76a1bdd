"""Recorded engine messages in, scores out: no engine, no network.

    python -m kvatlas.deploy.examples.offline [CAPTURE]

``demo.kvcap`` holds what two vLLM pods sent while they served one traffic; ``kvatlas replay`` makes captures of yours.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters import vllm
from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.bridge.model.events import Limits, Stored
from kvatlas.deploy.history.capture import read_capture
from kvatlas.scorer import Indexer

CAPTURE = Path(__file__).with_name("demo.kvcap")


async def show(capture: Path, prompts: int) -> None:
    """Apply a capture and score the beginnings of the newest prompts in it."""
    seen: list[tuple[str, str | None, bytes]] = []
    async with Indexer() as indexer:
        for record in read_capture(capture):
            await indexer.apply_record(record.key, record.value, record.headers)
            seen += _prompts(record.value or b"", dict(record.headers))
        for model, salt, tokens in seen[-prompts:]:
            scored = await indexer.score_tokens(tokens, model, cache_salt=salt)
            print(f"{len(tokens) // TOKEN_BYTES} tokens of {model}{' (salted)' if salt else ''}")
            for pod, score in scored.scores.items():
                tiers = ", ".join(f"{count} on {tier}" for tier, count in score.tiers.items())
                print(f"  {pod}: score {score.score:g}, {score.matched_tokens} tokens cached ({tiers})")


def _prompts(payload: bytes, headers: dict[str, bytes]) -> list[tuple[str, str | None, bytes]]:
    """Return the prompts that begin in a message: (model, cache salt, packed tokens)."""
    if headers.get(topics.H_CONTENT_TYPE, b"engine") != topics.CONTENT_ENGINE.encode():
        return []
    model = headers.get(topics.H_MODEL, b"").decode()
    events = vllm.decode(payload, Limits()).events
    return [
        (model, event.cache_salt, event.tokens)
        for event in events
        if isinstance(event, Stored) and event.parent is None and event.tokens and event.lora is None
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("capture", nargs="?", type=Path, default=CAPTURE)
    parser.add_argument("--prompts", type=int, default=5, help="prompts to score (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        asyncio.run(show(args.capture, args.prompts))
    except KvatlasError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
