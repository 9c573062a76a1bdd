"""Bytes of the ``engine_blocks`` table: what a pod's engine keys stand for, and where each pod stands.

Keys begin with the pod's reference, so that a pod's entries lie together; the kind comes next::

    | pod ref 8 | 00 |                               the pod's state
    | pod ref 8 | 01 | group 2 | engine key ... |    an engine block
    | pod ref 8 | 02 | group 2 | block key 16   |    engine keys that stand for one block key
    | pod ref 8 | 03 | group 2 | engine key ... |    engine blocks that wait for this parent

An engine block is the tiers that hold it and what it stands for::

    | form 1 | tiers 1 | tiers * ( tier 1 | announcements 2 | epoch 8 ) | body |

With form 1 (plain) the body is the block keys that it covers, 16 bytes each: all there is to say when engine blocks
end where canonical blocks end. With form 2 (linked) it is the msgpack of a :class:`Link`: the block shares canonical
blocks with others, waits for its parent, or is masked. The other kinds are the msgpack of their structs; all
numbers are big-endian.

A tier's epoch is that of the announcement that its count began with; 0 on the shared tier, which outlives epochs.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import VersionError, WireError
from kvatlas.bridge.model.chain import Tail
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.records import LIVE, GroupSpec
from kvatlas.bridge.model.validity import exists, is_suspect

SCHEMA_VERSION: Final = 1

KIND_STATE: Final = b"\x00"
KIND_BLOCK: Final = b"\x01"
KIND_OWNERS: Final = b"\x02"
KIND_WAITING: Final = b"\x03"
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


class Pending(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block whose parent is not known yet: what its keys will be made of.

    Attributes:
        parent: engine key that it waits for.
        tokens: its tokens, little-endian u32.
        extra: its typed extra keys, offsets relative to the engine block.
        epoch: the pod's epoch when it was parked; a clear or restart ends the wait.
    """

    parent: bytes
    tokens: bytes
    extra: list[Any]
    epoch: int


class Link(msgspec.Struct, array_like=True):
    """Body of a linked engine block.

    Attributes:
        keys: packed block keys of the canonical blocks that end in this engine block.
        members: engine keys before it in the canonical block that the first of ``keys`` names.
        tail: where the next engine block goes on; None while unknown (pending or masked).
        finals: engine keys whose first block key this block is a member of.
        pending: set while the parent is unknown.
        epoch: the pod's epoch when this was written; without a live tier the block ends with that epoch.
    """

    keys: bytes = b""
    members: list[bytes] = []
    tail: Tail | None = None
    finals: list[bytes] = []
    pending: Pending | None = None
    epoch: int = 0


class Block:
    """A decoded engine block, as the slow paths change it.

    Attributes:
        tiers: tier -> (announcements, epoch), only of live tiers.
        link: what it stands for.
    """

    __slots__ = ("link", "tiers")

    def __init__(self, tiers: dict[int, tuple[int, int]], link: Link) -> None:
        self.tiers = tiers
        self.link = link

    @property
    def masked(self) -> bool:
        """Tell whether no key can be derived for it or for what follows it."""
        return self.link.tail is None and self.link.pending is None


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
            return Block(tiers, Link(body, [], Tail(body[-16:]), []))
        if form == LINKED:
            return Block(tiers, _link_decoder.decode(body))
    except (IndexError, struct.error, msgspec.MsgspecError) as error:
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
    )
    form = PLAIN if plain else LINKED
    return bytes((form, len(block.tiers))) + tiers + (link.keys if plain else _link_encoder.encode(link))


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
    """

    v: int
    pod: str
    incarnation: int = 0
    clears: int = 0
    last_sequence: int = -1
    valid_from: int = 0
    gpu_valid_from: int = 0
    suspect_before: int = 0
    orphans: int = 0
    orphans_since: int = 0
    aliasing: bool = False
    groups: dict[int, GroupSpec] = {}
    state: str = LIVE
    model: str = ""
    engine: str = ""
    store: str = ""
    dp_rank: int = 0
    last_event_ns: int = 0
    receive_ns: int = 0
    first_lost: int = -1
    last_lost: int = -1
    lost: int = 0
    events_partition: int = -1
    events_offset: int = -1

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
    except msgspec.MsgspecError as error:
        raise WireError(f"engine_blocks: not a pod's state: {error}") from error
    if state.v != SCHEMA_VERSION:
        raise VersionError(f"engine_blocks: pod state of version {state.v}; this build knows {SCHEMA_VERSION}")
    return state


class Owner(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An engine key that stands for a block key on a tier, as of an epoch."""

    tier: int
    epoch: int
    engine_key: bytes


class Waiting(msgspec.Struct, array_like=True):
    """Engine keys that wait for one parent, as of the epoch of the newest."""

    epoch: int
    children: list[bytes]


_owners_decoder: Final = msgspec.msgpack.Decoder(list[Owner])
_waiting_decoder: Final = msgspec.msgpack.Decoder(Waiting)
encode_record: Final = msgspec.msgpack.Encoder().encode


def decode_owners(value: bytes | None) -> list[Owner]:
    """Decode the owners of a block key; none for None.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        return [] if value is None else _owners_decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise WireError(f"engine_blocks: not a list of owners: {error}") from error


def decode_waiting(value: bytes) -> Waiting:
    """Decode a waiting list.

    Raises:
        WireError: the bytes are not such a value.
    """
    try:
        return _waiting_decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise WireError(f"engine_blocks: not a waiting list: {error}") from error
