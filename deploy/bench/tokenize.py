"""``kvatlas bench tokenize``: a long chat of which most was seen before, beside plain encoding of the whole of it."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.deploy.bench._figures import spread
from kvatlas.scorer.tokenization.files import TOKENIZER_FILE
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool

HELP: Final = "prompt to token ids: a chat of 8,192 tokens, 90 % of it seen before, beside plain encoding"

_MODEL: Final = "bench"
_TURN_SENTENCES: Final = 8
_SEEN: Final = 0.9
_VOCABULARY: Final = """the a cache prefix router answers question long short token block keeps reads writes engine
 memory while because after before people morning evening number seven twelve letter garden window station don't it's
 we'll careful quick quiet remember compare measure explain translate program function value result list table 2024
 3.14"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("tests/data/tokenizer"),
        help="folder with tokenizer.json (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=8_192, help="length of the prompt (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="prompts measured (default %(default)s)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures.

    Raises:
        SettingsError: the tokenizer folder has no tokenizer.
        KvatlasError: the tokens with the cache are not those without.
    """
    if not (args.tokenizer / TOKENIZER_FILE).is_file():
        raise SettingsError(f"{args.tokenizer} has no {TOKENIZER_FILE}: name a folder that has one with --tokenizer")
    known, plain = asyncio.run(_multiturn(args))
    yield _figure(f"multiturn-{args.tokens}", known, plain)
    yield _figure(f"threads-2-{args.tokens}", *asyncio.run(_parallel(args)))


async def _multiturn(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Each round is a new conversation: its first 90 % were asked about before, then all of it is."""
    tokenizer = Tokenizer.from_file(str(args.tokenizer / TOKENIZER_FILE))
    rng = random.Random(8192)  # noqa: S311  # the same text every time
    known, plain = [], []
    async with TokenizerPool(TokenizerSettings(models=(f"{_MODEL}={args.tokenizer}",))) as pool:
        await pool.load(_MODEL)
        for _ in range(args.rounds):
            seen, whole = _conversation(tokenizer, rng, args.tokens)
            await pool.encode(_MODEL, seen, add_special_tokens=False)
            begin = time.perf_counter()
            encoded = await pool.encode(_MODEL, whole, add_special_tokens=False)
            known.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            ids = tokenizer.encode(whole, add_special_tokens=False).ids
            plain.append(time.perf_counter() - begin)
            if encoded.list() != ids:
                raise KvatlasError("tokens with the prefix cache differ from plain encoding")
    return known, plain


async def _parallel(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Two prompts at once on two threads, beside one after the other, without the cache; time per pair."""
    tokenizer = Tokenizer.from_file(str(args.tokenizer / TOKENIZER_FILE))
    rng = random.Random(2)  # noqa: S311  # the same text every time
    together, apart = [], []
    settings = TokenizerSettings(models=(f"{_MODEL}={args.tokenizer}",), prefix_cache_bytes=0)
    async with TokenizerPool(settings) as pool:
        await pool.load(_MODEL)
        for _ in range(max(5, args.rounds // 4)):
            pair = [_conversation(tokenizer, rng, args.tokens)[1] for _ in range(2)]
            for text in pair:  # the library remembers words; neither side shall be the first to meet them
                await pool.encode(_MODEL, text)
            begin = time.perf_counter()
            await asyncio.gather(*(pool.encode(_MODEL, text) for text in pair))
            together.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for text in pair:
                await pool.encode(_MODEL, text)
            apart.append(time.perf_counter() - begin)
    return together, apart


def _conversation(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> tuple[str, str]:
    """Return a chat of so many tokens, in whole messages but for the last, and its first 90 %."""
    turns: list[str] = []
    counts: list[int] = []
    while sum(counts) < tokens:
        role = "user" if len(turns) % 2 == 0 else "assistant"
        text = f"<|im_start|>{role}\n{_text(rng)}<|im_end|>\n"
        turns.append(text)
        counts.append(len(tokenizer.encode(text, add_special_tokens=False).ids))
    seen, length = 0, 0
    while length + counts[seen] <= _SEEN * tokens:
        length += counts[seen]
        seen += 1
    whole = "".join(turns)
    places = tokenizer.encode(whole, add_special_tokens=False).offsets
    return "".join(turns[:seen]), whole[: places[tokens - 1][1]]


def _text(rng: random.Random) -> str:
    sentences = (
        " ".join(rng.choices(_VOCABULARY.split(), k=rng.randint(6, 16))).capitalize() for _ in range(_TURN_SENTENCES)
    )
    return ". ".join(sentences) + ".\n"


def _figure(case: str, values: list[float], baseline: list[float]) -> dict[str, Any]:
    found = spread(case, [value * 1e3 for value in values], "ms")
    base = statistics.median(baseline) * 1e3
    return found | {"baseline": round(base, 3), "ratio": round(base / found["value"], 1)}
