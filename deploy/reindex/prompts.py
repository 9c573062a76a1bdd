"""Prompts that engines have cached lately, rebuilt from the messages in ``kv-events``.

A stored event names its blocks' tokens and the block before them, so a chain of events gives back the beginning of a
prompt. Chains are followed per pod in the stretch of the log that is read; what began before it is left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.bridge.model.events import Limits, Stored
from kvatlas.deploy.history.log import LogReader, Range, Record
from kvatlas.deploy.history.moment import Moment
from kvatlas.streams.resolve.message import parse_message

#: Longest prompt kept, in tokens: a longer one says nothing more about the index.
LONGEST_TOKENS: Final = 16_384
_MOST_ENDS: Final = 200_000


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a prompt.

    Attributes:
        model, lora, cache_salt: what its block keys chain from besides the tokens; empty for none.
        tokens: little-endian u32.
    """

    model: str
    lora: str
    cache_salt: str
    tokens: bytes


class Chains:
    """Prompts by the engine key that ends them, for each pod; so many ends at most are remembered."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, bytes], Prompt] = {}

    def add(self, record: Record) -> Iterator[Prompt]:
        """Take a ``kv-events`` record in; yields the prompts that its stored events end."""
        message = parse_message(record.key, record.value, record.headers, record.partition, record.offset)
        if message.error or message.content != topics.CONTENT_ENGINE:
            return
        try:
            batch = adapter(message.engine)(message.value, Limits())
        except WireError:
            return  # dead-lettered by resolve
        for event in batch.events:
            if isinstance(event, Stored) and (made := self._extended(message.pod, message.model, event)) is not None:
                yield made

    def _extended(self, pod: str, model: str, event: Stored) -> Prompt | None:
        # Other groups repeat the tokens of group 0; blocks with images need more than tokens.
        if event.masked or event.lookahead or event.group or event.extra or not event.tokens or not event.keys:
            return None
        before = Prompt(model=model, lora=event.lora or "", cache_salt=event.cache_salt or "", tokens=b"")
        if event.parent is not None:
            known = self._ends.get((pod, event.parent))
            if known is None:
                return None
            before = known
        if len(before.tokens) >= LONGEST_TOKENS * TOKEN_BYTES:
            return None
        made = msgspec.structs.replace(before, tokens=before.tokens + event.tokens)
        step = event.block_size_tokens * TOKEN_BYTES
        for number, key in enumerate(event.keys, 1):
            # A later prompt may go on from any of the blocks.
            self._ends[pod, key] = msgspec.structs.replace(made, tokens=before.tokens + event.tokens[: number * step])
        while len(self._ends) > _MOST_ENDS:
            self._ends.pop(next(iter(self._ends)))
        return made


def sample(prompts: Iterable[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    """Return ``count`` different prompts, each equally likely."""
    different = sorted(set(prompts), key=lambda prompt: (prompt.tokens, prompt.model, prompt.lora, prompt.cache_salt))
    return different if len(different) <= count else rng.sample(different, count)


async def recent_prompts(reader: LogReader, messages: int, count: int, rng: random.Random) -> list[Prompt]:
    """Return prompts from the newest messages of every partition.

    Args:
        reader: an open reader.
        messages: how many to read back, over all partitions.
        count: prompts at most.
        rng: chooses among them.

    Raises:
        LogError: Kafka does not answer.
    """
    whole = await reader.range(topics.EVENTS, Moment(edge="earliest"), Moment(edge="latest"))
    each = max(1, messages // max(1, len(whole.bounds)))
    span = Range(whole.topic, {number: (max(first, end - each), end) for number, (first, end) in whole.bounds.items()})
    chains = Chains()
    found: set[Prompt] = set()
    async for chunk in reader.read(span):
        for record in chunk:
            found.update(chains.add(record))
    return sample(found, count, rng)
