"""One record of ``kv-events``, read into a frozen value: whose it is, where it stands in its stream, what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from kvatlas.bridge.model import epochs, topics
from kvatlas.bridge.model.topics import header_number

#: Sequence or incarnation that a message does not carry.
ABSENT: Final = -1

RawHeaders = Mapping[str, bytes] | Iterable[tuple[str, bytes]] | None


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A ``kv-events`` record.

    Attributes:
        pod: pod id, the record's key.
        value: the record's value: an engine's payload, a ``KeyedBatch`` or a ``Control``, as ``content`` says.
        content: content type, ``records.CONTENT_...``.
        sequence: publisher's counter; :data:`ABSENT` on control records.
        incarnation: incarnation of the pod when the bridge received it; :data:`ABSENT` when nobody says.
        engine: adapter that reads the payload.
        model: model name, part of every block key.
        receive_ns: the bridge's wall clock, ns since the epoch.
        store: shared store that the pod mounts, empty for the deployment's default.
        announcements: ``copies`` or ``presence``, empty for the deployment's default.
        blocks_per_chunk: engine blocks in a chunk of the pod's offload tier; 0 where its events say it.
        computes_again: the engine computes the last block that it matched again.
        partition: ``kv-events`` partition.
        offset: ``kv-events`` offset.
        headers: all headers as received.
        error: why the record cannot be used, empty when it can.
    """

    pod: str
    value: bytes
    content: str = topics.CONTENT_ENGINE
    sequence: int = ABSENT
    incarnation: int = ABSENT
    engine: str = "vllm"
    model: str = ""
    receive_ns: int = 0
    store: str = ""
    announcements: str = ""
    blocks_per_chunk: int = 0
    computes_again: bool = False
    partition: int = -1
    offset: int = -1
    headers: Mapping[str, bytes] = {}
    error: str = ""


def parse_message(
    key: bytes | None, value: bytes | None, headers: RawHeaders, partition: int = -1, offset: int = -1
) -> Message:
    """Read a ``kv-events`` record.

    Never raises: a record without a pod id or with a header that is no number comes back with ``error`` set, and
    :meth:`kvatlas.streams.resolve.resolver.Resolver.apply` dead-letters it.
    """
    found = dict(headers.items() if isinstance(headers, Mapping) else headers or ())
    get = found.get
    pod = (key or b"").decode(errors="replace")
    error = "" if pod else "the record has no key, so no pod id"
    try:
        sequence = header_number(get(topics.H_SEQUENCE))
        incarnation = header_number(get(topics.H_INCARNATION))
        receive_ns = header_number(get(topics.H_RECEIVE_NS))
    except ValueError:
        (sequence, incarnation, receive_ns), bad = _readable_numbers(found)
        error = error or bad
    if not error and incarnation > epochs.INCARNATION_MAX:
        error = f"header {topics.H_INCARNATION!r} is above {epochs.INCARNATION_MAX}"
    content = _text(get(topics.H_CONTENT_TYPE)) or topics.CONTENT_ENGINE
    if not error and sequence == ABSENT and content != topics.CONTENT_CONTROL:
        error = f"header {topics.H_SEQUENCE!r} is missing: the message's place in its stream is unknown"
    return Message(
        pod=pod,
        value=bytes(value or b""),
        content=content,
        sequence=sequence,
        incarnation=incarnation,
        engine=_text(get(topics.H_ENGINE)) or "vllm",
        model=_text(get(topics.H_MODEL)),
        receive_ns=max(receive_ns, 0),
        store=_text(get(topics.H_STORE)),
        announcements=_text(get(topics.H_ANNOUNCEMENTS)),
        blocks_per_chunk=_small(get(topics.H_BLOCKS_PER_CHUNK)),
        computes_again=get(topics.H_COMPUTES_AGAIN) == b"1",
        partition=partition,
        offset=offset,
        headers=found,
        error=error,
    )


def _readable_numbers(headers: Mapping[str, bytes]) -> tuple[list[int], str]:
    """Return sequence, incarnation and receive time as far as they are numbers, and what is wrong with the first."""
    numbers, error = [], ""
    for name in (topics.H_SEQUENCE, topics.H_INCARNATION, topics.H_RECEIVE_NS):
        try:
            numbers.append(header_number(headers.get(name)))
        except ValueError:
            numbers.append(ABSENT)
            error = error or f"header {name!r} is {headers[name]!r}; expected a decimal number of at most 63 bits"
    return numbers, error


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if value else ""


def _small(value: bytes | None) -> int:
    """Return an option's number; 0 for what is none, as options decide nothing that would lose the message."""
    return int(value) if value is not None and len(value) <= 9 and value.isdigit() else 0
