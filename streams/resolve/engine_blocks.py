"""Bytes of the ``engine_blocks`` table: what a pod's engine keys stand for, and where each pod stands.

Keys begin with the pod's reference, so that a pod's entries lie together; the kind comes next::

    | pod ref 8 | 00 |                               the pod's state
    | pod ref 8 | 01 | group 2 | engine key ... |    an engine block
    | pod ref 8 | 02 | group 2 | block key 16   |    engine keys that stand for one block key
    | pod ref 8 | 03 | group 2 | engine key ... |    engine blocks that wait for this parent
    | pod ref 8 | 04 | ticket 8 |                    the engine block that began to wait with this ticket

An engine block is the tiers that hold it and what it stands for::

    | form 1 | tiers 1 | tiers * ( tier 1 | announcements 2 | epoch 8 ) | body |

A tier is its number, and in the upper four bits the slot of the owner of that copy, 0 for the engine itself (see
:attr:`PodState.owners`). With form 1 (plain) the body is the block keys that it covers, 16 bytes each: all there is to
say when engine blocks end where canonical blocks end. With form 2 (linked) it is the msgpack of a :class:`Link`: the
block shares canonical blocks with others, waits for its parent, is held, or is masked. The other kinds are the msgpack
of their structs; all numbers are big-endian. A tier's epoch is that of the announcement that its count began with; 0 on
the shared tier, which outlives epochs.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, VersionError, WireError
from kvatlas.bridge.model import numbers
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.chain import Tail
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.records import LIVE, GroupSpec
from kvatlas.bridge.model.validity import exists, is_suspect

SCHEMA_VERSION: Final = 1

KIND_STATE: Final = b"\x00"
KIND_BLOCK: Final = b"\x01"
KIND_OWNERS: Final = b"\x02"
KIND_WAITING: Final = b"\x03"
KIND_TICKET: Final = b"\x04"
POD_BYTES: Final = 8
#: Bytes of a key before the engine key or block key.
PREFIX_BYTES: Final = 11

PLAIN: Final = 1
LINKED: Final = 2

#: Form and tier count, and the first tier: everything before the keys of a plain block on one tier.
HEAD: Final = struct.Struct(">BBBHQ")
HEAD_BYTES: Final = HEAD.size
TIER: Final = struct.Struct(">BHQ")
MAX_ANNOUNCEMENTS: Final = 65_535

_SLOT_BITS: Final = 4
_TIER_MASK: Final = (1 << _SLOT_BITS) - 1
#: Owners of copies beyond this many share the last slot.
SLOTS_MAX: Final = (1 << (8 - _SLOT_BITS)) - 1


def state_key(ref: bytes) -> bytes:
    """Return the key of a pod's state; ``ref`` is the pod's reference as 8 bytes."""
    return ref + KIND_STATE


def block_prefix(ref: bytes, group: int) -> bytes:
    """Return what the keys of a group's engine blocks begin with."""
    return ref + KIND_BLOCK + group.to_bytes(2, "big")


def owners_prefix(ref: bytes, group: int) -> bytes:
    """Return what the keys of a group's owner records begin with."""
    return ref + KIND_OWNERS + group.to_bytes(2, "big")


def waiting_prefix(ref: bytes, group: int) -> bytes:
    """Return what the keys of a group's waiting lists begin with."""
    return ref + KIND_WAITING + group.to_bytes(2, "big")


def ticket_key(ref: bytes, ticket: int) -> bytes:
    """Return the key of a ticket: pods' waiting blocks in the order in which they began to wait."""
    return ref + KIND_TICKET + ticket.to_bytes(8, "big")


def place_of(tier: int, slot: int) -> int:
    """Return the byte of one owner's copies on a tier."""
    return tier | slot << _SLOT_BITS


def tier_at(place: int) -> int:
    """Return the tier of :func:`place_of`."""
    return place & _TIER_MASK


class Pending(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block whose parent is not known yet: what its keys will be made of.

    Attributes:
        parent: engine key that it waits for.
        tokens: its tokens, little-endian u32.
        extra: its typed extra keys, offsets relative to the engine block.
        epoch: the pod's epoch when it was parked; a clear or restart ends the wait.
        ticket: its place among the pod's waiting blocks; 0 in what older builds wrote.
        unnamed: its tokens alone do not name it, as in :class:`~kvatlas.bridge.model.events.Stored`.
        ahead: the token behind it, where the engine's cache is keyed by pairs.
    """

    parent: bytes
    tokens: bytes
    extra: list[Any]
    epoch: int
    ticket: int = 0
    unnamed: bool = False
    ahead: bytes = b""


class Link(msgspec.Struct, array_like=True):
    """Body of a linked engine block.

    Attributes:
        keys: packed block keys of the canonical blocks that end in this engine block.
        members: engine keys before it in the canonical block that the first of ``keys`` names.
        tail: where the next engine block goes on; None while unknown (pending or masked).
        finals: engine keys whose first block key this block is a member of.
        pending: set while the parent is unknown.
        epoch: the pod's epoch when this was written; without a live tier the block ends with that epoch.
        held: nothing is known but where it is: it may have a salt or a picture that its event could not say, so it
            stands for nothing until an event names it.
        assumed: what it stands for was concluded from tokens alone; an event that names it in full corrects it.
    """

    keys: bytes = b""
    members: list[bytes] = []
    tail: Tail | None = None
    finals: list[bytes] = []
    pending: Pending | None = None
    epoch: int = 0
    held: bool = False
    assumed: bool = False


class Block:
    """A decoded engine block, as the slow paths change it.

    Attributes:
        tiers: place (:func:`place_of`) -> (announcements, epoch), only of live tiers.
        link: what it stands for.
    """

    __slots__ = ("link", "tiers")

    def __init__(self, tiers: dict[int, tuple[int, int]], link: Link) -> None:
        self.tiers = tiers
        self.link = link

    @property
    def masked(self) -> bool:
        """Tell whether no key can be derived for it or for what follows it."""
        return self.link.tail is None and self.link.pending is None and not self.link.held

    def on(self, tier: int) -> int | None:
        """Return the newest epoch of a tier's copies, whoever owns them; None without any."""
        newest: int | None = None
        for place, (_, epoch) in self.tiers.items():
            if place & _TIER_MASK == tier and (newest is None or epoch > newest):
                newest = epoch
        return newest

    def levels(self) -> dict[int, int]:
        """Return tier -> newest epoch."""
        found: dict[int, int] = {}
        for place, (_, epoch) in self.tiers.items():
            tier = place & _TIER_MASK
            found[tier] = max(epoch, found.get(tier, 0))
        return found


_link_encoder: Final = msgspec.msgpack.Encoder()
_link_decoder: Final = msgspec.msgpack.Decoder(Link)


def decode_block(value: bytes) -> Block:
    """Decode an engine block.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        form, count = value[0], value[1]
        end = 2 + count * TIER.size
        tiers = {tier: (announced, epoch) for tier, announced, epoch in TIER.iter_unpack(value[2:end])}
        body = value[end:]
        if form == PLAIN:
            return Block(tiers, Link(body, [], Tail(body[-KEY_BYTES:]), []))
        if form == LINKED:
            return Block(tiers, _link_decoder.decode(body))
    except (IndexError, struct.error, *DECODE_ERRORS) as error:
        raise WireError(f"engine_blocks: not an engine block: {error}") from error
    raise VersionError(f"engine_blocks: engine block of form {form}; this build knows {PLAIN} and {LINKED}")


def encode_block(block: Block) -> bytes:
    """Encode an engine block, plain when it can be."""
    link = block.link
    tiers = b"".join([TIER.pack(tier, *held) for tier, held in sorted(block.tiers.items())])
    plain = (
        link.keys
        and not link.members
        and not link.finals
        and link.pending is None
        and link.tail is not None
        and not link.tail.tokens
        and link.tail.key == link.keys[-KEY_BYTES:]
        and not link.assumed
    )
    form = PLAIN if plain else LINKED
    return bytes((form, len(block.tiers))) + tiers + (link.keys if plain else _link_encoder.encode(link))


#: Bits of :attr:`PodState.names`.
SALTS: Final = 1
EXTRAS: Final = 2
ADAPTERS: Final = 4


#: Bits of :attr:`PodState.noticed`.
UNSIZED: Final = 1
HIDDEN: Final = 2
REPORTS: Final = 4


class PodState(msgspec.Struct, array_like=True):
    """Where a pod stands: written with every message that it sent.

    Attributes:
        pod: pod id.
        incarnation, clears: halves of the epoch of what is written now.
        last_sequence: last sequence applied in this incarnation; -1 before the first.
        valid_from, gpu_valid_from, suspect_before: as in :class:`~kvatlas.bridge.model.records.PodRecord`.
        orphans: blocks that wait for their parents.
        orphans_since: epoch before which parked blocks count as dropped.
        aliasing: two engine keys may stand for one block key, so owners are kept.
        groups: group -> spec.
        names: what names blocks beyond their tokens in the pod's events so far, bits of :data:`SALTS` and so on.
        bare: the pod announces blocks with keys of their own, which say neither salt nor adapter.
        pairs: the engine's cache is keyed by pairs of tokens.
        chunk_tokens: tokens that an offload tier stores and loads as one, as its events show; 0 until they do.
        blocks_per_chunk: engine blocks of such a chunk as the endpoint's options say; 0 when they do not.
        next_ticket: ticket of the next block that waits; tickets begin with 1.
        first_ticket: no block waits with an older one.
        owners: names of those that own copies of their own, in the order of their slots from 1 on.
        noticed: what was said of the pod in the log, bits of :data:`UNSIZED` and so on.
        reports: events that announced again what was there, for requests that asked for a full report.
        adapters, computes_again: as in :class:`~kvatlas.bridge.model.records.PodRecord`; the first few adapters.
    """

    v: int
    pod: str
    incarnation: numbers.Incarnation = 0
    clears: numbers.Word = 0
    last_sequence: numbers.Sequence = -1
    valid_from: numbers.Epoch = 0
    gpu_valid_from: numbers.Epoch = 0
    suspect_before: numbers.Epoch = 0
    orphans: numbers.Sequence = 0
    orphans_since: numbers.Epoch = 0
    aliasing: bool = False
    groups: dict[numbers.Short, GroupSpec] = {}
    state: str = LIVE
    model: str = ""
    engine: str = ""
    store: str = ""
    dp_rank: numbers.Tokens = 0
    last_event_ns: numbers.Nanoseconds = 0
    receive_ns: numbers.Nanoseconds = 0
    first_lost: numbers.Sequence = -1
    last_lost: numbers.Sequence = -1
    lost: numbers.Count = 0
    events_partition: numbers.Partition = -1
    events_offset: numbers.Sequence = -1
    names: numbers.Count = 0
    bare: bool = False
    pairs: bool = False
    chunk_tokens: numbers.Tokens = 0
    blocks_per_chunk: numbers.Tokens = 0
    next_ticket: numbers.Count = 1
    first_ticket: numbers.Count = 1
    owners: list[str] = []
    reports: numbers.Count = 0
    noticed: numbers.Count = 0
    adapters: list[str] = []
    computes_again: bool = False

    @property
    def named(self) -> bool:
        """Tell whether tokens alone are known not to name all of the pod's blocks."""
        return bool(self.names & (SALTS | EXTRAS)) or (self.bare and bool(self.names & ADAPTERS))

    @property
    def epoch(self) -> int:
        """Return the epoch of what is written now."""
        return epoch_of(self.incarnation, self.clears)

    def live(self, tier: int, epoch: int) -> bool:
        """Tell whether something announced on a tier under an epoch still counts."""
        return exists(self, tier, epoch)

    def suspect(self, tier: int, epoch: int) -> bool:
        """Tell whether something that counts was announced before a gap, so that it may be gone."""
        return is_suspect(self, tier, epoch)


_state_encoder: Final = msgspec.msgpack.Encoder()
_state_decoder: Final = msgspec.msgpack.Decoder(PodState)
encode_state = _state_encoder.encode


def decode_state(value: bytes) -> PodState:
    """Decode a pod's state.

    Raises:
        VersionError: the schema version is not known here.
        WireError: the bytes are not such a value.
    """
    try:
        state = _state_decoder.decode(value)
    except DECODE_ERRORS as error:
        raise WireError(f"engine_blocks: not a pod's state: {error}") from error
    if state.v != SCHEMA_VERSION:
        raise VersionError(f"engine_blocks: pod state of version {state.v}; this build knows {SCHEMA_VERSION}")
    return state


class Owner(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An engine key that stands for a block key on a tier, as of an epoch."""

    tier: int
    epoch: int
    engine_key: bytes


class WaitingChildren(msgspec.Struct, array_like=True):
    """Engine keys that wait for one parent, as of the epoch of the newest."""

    epoch: int
    children: list[bytes]


class Ticket(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The engine block that began to wait for its parent with a ticket, and the pod's epoch then."""

    epoch: int
    group: int
    engine_key: bytes


_ticket_decoder: Final = msgspec.msgpack.Decoder(Ticket)
_owners_decoder: Final = msgspec.msgpack.Decoder(list[Owner])
_waiting_decoder: Final = msgspec.msgpack.Decoder(WaitingChildren)
encode_record: Final = msgspec.msgpack.Encoder().encode


def decode_owners(value: bytes | None) -> list[Owner]:
    """Decode the owners of a block key; none for None.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        return [] if value is None else _owners_decoder.decode(value)
    except DECODE_ERRORS as error:
        raise WireError(f"engine_blocks: not a list of owners: {error}") from error


def decode_ticket(value: bytes) -> Ticket:
    """Decode a ticket.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        return _ticket_decoder.decode(value)
    except DECODE_ERRORS as error:
        raise WireError(f"engine_blocks: not a ticket: {error}") from error


def decode_waiting(value: bytes) -> WaitingChildren:
    """Decode a waiting list.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        return _waiting_decoder.decode(value)
    except DECODE_ERRORS as error:
        raise WireError(f"engine_blocks: not a waiting list: {error}") from error
