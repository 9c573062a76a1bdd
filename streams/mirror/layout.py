r"""Keys and scripts of the index mirror in a Redis or Valkey server. Pure: bytes and text.

All keys are under a prefix and the schema version, so that versions can live side by side; ``<p>`` is a partition of
``kv-blocks``, 2 bytes, big-endian::

    <prefix>:v1:b:<16-byte block key>   packed holders, the bytes of a block_index value
    <prefix>:v1:layout                  MirrorLayout: partitions, block size, index version
    <prefix>:v1:pods:<p>                hash: pod id -> its PodRecord, both writers joined; pods by pod_partition
    <prefix>:v1:m:<p>                   position: what of the partition's changelog is in the mirror
    <prefix>:v1:o:<p>                   claim of the worker that writes the partition; it expires

A position is written with the last entries of a flush and is missing while a partition is being copied, so a reader
knows which partitions it can believe::

    | changelog offset 8 | source offset 8 | receive ns 8 | committed ns 8 |

A claim orders the writers. It begins with the Kafka generation of the worker's assignment, so the worker that was
given the partition later always takes it over, and the earlier one, which may not know yet, can write no more::

    | generation 8 | worker id |
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, NamedTuple

import msgspec

from kvatlas.bridge.model.block_key import KEY_VERSION

SCHEMA: Final = 1
_POSITION: Final = struct.Struct(">qqqq")
_GENERATION: Final = struct.Struct(">Q")

#: KEYS: claim, position. ARGV: token, lifetime in ms. Returns whether it is ours, and the position or the other claim.
#: Generations are compared byte by byte: Lua's own order follows the server's locale, in which bytes are letters.
CLAIM: Final = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then
  local later = false
  for i = 1, 8 do
    local mine, theirs = string.byte(ARGV[1], i), string.byte(held, i)
    if mine ~= theirs then later = mine > theirs; break end
  end
  if not later then return {0, held} end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1, redis.call('GET', KEYS[2]) or ''}
"""

#: KEYS: claim, position, then entries. ARGV: token, position expected (empty: none), position to write (empty: keep,
#: "-": remove), then a value an entry (empty removes). Returns 1; 0 when the claim is lost; -1 at another position.
WRITE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[2] then return -1 end
for i = 3, #KEYS do
  local value = ARGV[i + 1]
  if value == '' then redis.call('DEL', KEYS[i]) else redis.call('SET', KEYS[i], value) end
end
if ARGV[3] == '-' then redis.call('DEL', KEYS[2]) elseif ARGV[3] ~= '' then redis.call('SET', KEYS[2], ARGV[3]) end
return 1
"""

#: KEYS: claim, hash. ARGV: token, then field and value in turns (an empty value removes). Returns 1, or 0 as above.
PODS: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[2], ARGV[i])
  else redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
return 1
"""


class MirrorLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What all partitions of a mirror have in common.

    Attributes:
        partitions: of ``kv-blocks``.
        block_size_tokens: canonical block size.
        key_version: version of the block key.
        index_version: the index version whose workers write it.
    """

    v: int = SCHEMA
    partitions: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    block_size_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    key_version: int = KEY_VERSION
    index_version: str


class MirrorPosition(NamedTuple):
    """How far a partition is mirrored; offsets are -1 for nothing, times in ns since the epoch and 0 for none.

    Attributes:
        changelog_offset: everything up to it is in the mirror.
        source_offset: the record of ``kv-blocks`` that this reflects.
        receive_ns: newest receive time in it, the bridge's clock.
        committed_ns: when the table took it, the worker's clock.
    """

    changelog_offset: int
    source_offset: int
    receive_ns: int
    committed_ns: int

    def pack(self) -> bytes:
        """Return its bytes."""
        return _POSITION.pack(*self)


def position_of(value: bytes | None) -> MirrorPosition | None:
    """Return a position from its bytes; None for none, or for bytes of another length."""
    return MirrorPosition(*_POSITION.unpack(value)) if value and len(value) == _POSITION.size else None


def token(generation: int, worker: str) -> bytes:
    """Return a worker's claim."""
    return _GENERATION.pack(max(generation, 0)) + worker.encode()


class Names:
    """The keys of one mirror.

    Args:
        prefix: put before every key.
    """

    def __init__(self, prefix: str) -> None:
        base = f"{prefix}:v{SCHEMA}:".encode()
        self.blocks = base + b"b:"
        self.layout = base + b"layout"
        self._base = base

    def pods(self, partition: int) -> bytes:
        """Return the hash of the pods of a partition."""
        return self._base + b"pods:" + partition.to_bytes(2, "big")

    def position(self, partition: int) -> bytes:
        """Return the key of a partition's position."""
        return self._base + b"m:" + partition.to_bytes(2, "big")

    def claim(self, partition: int) -> bytes:
        """Return the key of a partition's claim."""
        return self._base + b"o:" + partition.to_bytes(2, "big")
