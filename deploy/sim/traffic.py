"""What clients ask: conversations that share system prompts, or the requests of a trace file."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Final

import msgspec

from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.errors import TraceError
from kvatlas.deploy.sim.options import SimPlan

TRACE_BLOCK_TOKENS: Final = 512


class _Session(msgspec.Struct, eq=False):
    number: int
    history: list[int]
    turns_left: int
    cache_salt: str | None
    lora: str | None


def conversations(settings: SimPlan) -> Iterator[Request]:
    """Yield requests of conversations without end; equal settings yield equal requests.

    A turn's prompt is the system prompt, every earlier turn with its answer, and the new turn of the user.
    """
    rng = random.Random(settings.seed)  # noqa: S311 - traffic, not secrets
    vocabulary = settings.vocabulary
    systems = [
        [rng.randrange(vocabulary) for _ in range(settings.system_tokens)] for _ in range(settings.system_prompts)
    ]
    numbers = iter(range(1, 1 << 62))

    def opened() -> _Session:
        number = next(numbers)
        return _Session(
            number=number,
            history=list(rng.choice(systems)),
            turns_left=rng.randint(1, settings.turns * 2 - 1),
            cache_salt=f"tenant-{rng.randrange(4)}" if rng.random() < settings.salted_share else None,
            lora=f"adapter-{rng.randrange(3)}" if rng.random() < settings.lora_share else None,
        )

    def some(mean: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(max(mean // 2, 1), max(mean * 3 // 2, 1)))]

    sessions = [opened() for _ in range(settings.sessions)]
    count = 0
    while True:
        place = rng.randrange(len(sessions))
        session = sessions[place]
        prompt = session.history + some(settings.user_tokens)
        output = some(settings.output_tokens)
        yield Request(
            tokens=prompt,
            output=output,
            cache_salt=session.cache_salt,
            lora=session.lora,
            session=session.number,
            at_seconds=count / settings.requests_per_second,
        )
        count += 1
        session.history = prompt + output
        session.turns_left -= 1
        if session.turns_left <= 0:
            sessions[place] = opened()


class TraceLine(msgspec.Struct, frozen=True):
    """One request of a trace file (Mooncake's format)."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[int]


_trace_line: Final = msgspec.json.Decoder(TraceLine)


def trace(settings: SimPlan) -> Iterator[Request]:
    """Yield the requests of a trace file: one JSON object a line with ``timestamp`` (ms), ``input_length``,
    ``output_length`` (tokens) and ``hash_ids``, one id per started 512 tokens of input.

    Equal ids become equal tokens. The session of a request is its first id, what its prompt begins with.

    Raises:
        TraceError: the file cannot be read or a line is not in the format.
    """  # noqa: D205 - one sentence needs two lines
    path = Path(settings.trace)
    rng = random.Random(settings.seed)  # noqa: S311 - traffic, not secrets
    content = _Content(settings.seed, settings.vocabulary)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield _traced(line, f"{path}:{number}", settings, rng, content)
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot read trace file {path}: {error}") from error


class _Content:
    def __init__(self, seed: int, vocabulary: int) -> None:
        self._seed, self._vocabulary = seed, vocabulary
        self.tokens = lru_cache(maxsize=4096)(self._tokens)

    def _tokens(self, identifier: int) -> tuple[int, ...]:
        rng = random.Random(self._seed << 64 | (identifier & 0xFFFFFFFFFFFFFFFF))  # noqa: S311 - traffic
        return tuple(int(rng.random() * self._vocabulary) for _ in range(TRACE_BLOCK_TOKENS))


def _traced(
    line: bytes,
    where: str,
    settings: SimPlan,
    rng: random.Random,
    content: _Content,
) -> Request:
    try:
        entry = _trace_line.decode(line)
    except msgspec.MsgspecError as error:
        raise TraceError(f"{where}: not a traced request: {error}") from error
    blocks = -(-entry.input_length // TRACE_BLOCK_TOKENS)
    if len(entry.hash_ids) != blocks:
        raise TraceError(f"{where}: {len(entry.hash_ids)} hash_ids for {entry.input_length} tokens; expected {blocks}")
    tokens = [token for identifier in entry.hash_ids for token in content.tokens(identifier)]
    return Request(
        tokens=tokens[: entry.input_length],
        output=[
            rng.randrange(settings.vocabulary) for _ in range(min(entry.output_length, settings.trace_output_tokens))
        ],
        session=entry.hash_ids[0],
        at_seconds=entry.timestamp / 1000 / settings.trace_speed,
    )


def requests(settings: SimPlan) -> Iterator[Request]:
    """Yield the traffic that the settings ask for."""
    return trace(settings) if settings.trace else conversations(settings)
