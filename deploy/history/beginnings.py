"""The tokens behind a block key: prompts' beginnings followed through the events that carry token ids."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from kvatlas.bridge.errors import SettingsError, WireError
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.block_key import TOKEN_BYTES, root_key
from kvatlas.bridge.model.chain import Tail, extend, split_keys
from kvatlas.bridge.model.events import Limits, Stored
from kvatlas.deploy.history.log import LogReader, Range, Record
from kvatlas.streams.resolve.message import Message, parse_message

#: Engine blocks that are followed at once.
_MOST_BLOCKS: Final = 400_000


class Beginning(NamedTuple):
    """How a prompt begins, up to the block that was looked for.

    Attributes:
        model, lora, cache_salt: as its blocks were named; empty for none.
        tokens: token ids from the first on.
    """

    model: str
    lora: str
    cache_salt: str
    tokens: list[int]


class _Link(NamedTuple):
    """One engine block behind others of its prompt."""

    tail: Tail
    before: _Link | None
    tokens: bytes
    name: tuple[str, str, str]


class Beginnings:
    """Follows prompts through events until one reaches a block key.

    Args:
        key: the block key looked for.
        block_size_tokens: canonical block size.
    """

    def __init__(self, key: bytes, block_size_tokens: int) -> None:
        self._key = key
        self._size = block_size_tokens
        self._links: dict[tuple[str, int, bytes], _Link] = {}

    def feed(self, record: Record) -> Beginning | None:
        """Take the next record of ``kv-events``; returns the beginning once it is there.

        Raises:
            SettingsError: too much is on the way.
        """
        message = parse_message(record.key, record.value, record.headers)
        if message.error or message.content != topics.CONTENT_ENGINE:
            return None
        try:
            batch = adapter(message.engine)(message.value, Limits())
            for event in batch.events:
                if isinstance(event, Stored) and (found := self._stored(message, event)) is not None:
                    return found
        except (WireError, ValueError, OverflowError):
            return None  # the worker buries it, with its reason
        return None

    def _stored(self, message: Message, event: Stored) -> Beginning | None:
        if not event.tokens or event.masked:
            return None
        if event.parent is None:
            name = (message.model, event.lora or "", event.cache_salt or "")
            link: _Link | None = _Link(Tail(root_key(*name)), None, b"", name)
        else:
            link = self._links.get((message.pod, event.group, event.parent))
        if link is None:
            return None
        width, behind = event.block_size_tokens * TOKEN_BYTES, event.tokens + event.ahead
        for number, engine_key in enumerate(event.keys):
            end = (number + 1) * width
            keys, _, tail = extend(
                link.tail,
                engine_key,
                event.tokens[number * width : end],
                event.extra[number] if event.extra else (),
                self._size,
                ahead=behind[end : end + TOKEN_BYTES] if event.ahead else b"",
            )
            link = _Link(tail, link, event.tokens[number * width : end], link.name)
            if self._key in split_keys(keys):
                return _beginning(link)
            self._links[message.pod, event.group, engine_key] = link
        if len(self._links) > _MOST_BLOCKS:
            raise SettingsError(f"more than {_MOST_BLOCKS} blocks were stored in this time; look at a shorter one")
        return None


def _beginning(link: _Link) -> Beginning:
    parts = []
    at: _Link | None = link
    while at is not None:
        parts.append(at.tokens)
        at = at.before
    packed = b"".join(reversed(parts))
    return Beginning(*link.name, list(struct.unpack(f"<{len(packed) // TOKEN_BYTES}I", packed)))


async def find_beginning(reader: LogReader, span: Range, key: bytes, block_size_tokens: int) -> Beginning | None:
    """Return how a prompt begins that has a block, None where no event of a range carries its tokens.

    Raises:
        SettingsError: too much was stored in the range.
        LogError: Kafka stopped answering.
    """
    by_partition: Mapping[int, Beginnings] = {part: Beginnings(key, block_size_tokens) for part in span.bounds}
    async for chunk in reader.read(span):
        for record in chunk:
            if (found := by_partition[record.partition].feed(record)) is not None:
                return found
    return None
