"""The index in a Redis or Valkey server, shared by any number of writers and readers.

Keys, all under a prefix and the schema version, so that versions can live side by side::

    <prefix>:v1:b:<16-byte block key>   packed holders, the bytes of a block_index value
    <prefix>:v1:p:<8-byte pod ref>      incarnation 8 | last sequence 8, as in the workers' tables
    <prefix>:v1:mark                    which indexer's state goes with the entries
    <prefix>:schema                     the version that was written last, for people

An update is a read-modify-write. It runs as a script inside the server, which runs one script at a time, so writers
that apply at once cannot lose each other's holders. A script reads keys that it is given, so all keys of a record must
be on one server: Redis Cluster is not supported.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

from redis.exceptions import RedisError

from kvatlas.bridge.records import incarnation_of
from kvatlas.scorer.backends.base import Stats, slices
from kvatlas.scorer.backends.errors import BackendError
from kvatlas.streams.codec import BlocksRecord
from kvatlas.streams.index import block_keys_of, sweep_index
from kvatlas.streams.redis_link import connect, escaped, where

SCHEMA: Final = 1
_CHUNK: Final = 1_000
_MGET: Final = 1_024
_POSITION: Final = struct.Struct(">QQ")
_T = TypeVar("_T")

#: KEYS: position, then one per update. ARGV: new position, ops, holders, "1" when the position moves with this piece.
#: Holders are 24 bytes: 11 of identity, then kind and window, and the epoch from byte 17 on (Lua counts from 1).
APPLY: Final = """
local seen = redis.call('GET', KEYS[1])
if seen and seen >= ARGV[1] and ARGV[5] ~= '1' then return 0 end
if seen and seen > ARGV[1] then return 0 end
local ops, packed = ARGV[2], ARGV[3]
for i = 2, #KEYS do
  local at = (i - 2) * 24
  local holder = string.sub(packed, at + 1, at + 24)
  local identity, epoch = string.sub(holder, 1, 11), string.sub(holder, 17, 24)
  local value = redis.call('GET', KEYS[i]) or ''
  local result, placed = nil, false
  for j = 1, #value, 24 do
    local found = string.sub(value, j, j + 10)
    if found == identity then
      placed = true
      if string.sub(value, j + 16, j + 23) <= epoch then
        local insert = ''
        if string.byte(ops, i - 1) == 1 then insert = holder end
        result = string.sub(value, 1, j - 1) .. insert .. string.sub(value, j + 24)
      end
      break
    elseif found > identity then
      placed = true
      if string.byte(ops, i - 1) == 1 then
        result = string.sub(value, 1, j - 1) .. holder .. string.sub(value, j)
      end
      break
    end
  end
  if not placed and string.byte(ops, i - 1) == 1 then result = value .. holder end
  if result then
    if result == '' then redis.call('DEL', KEYS[i])
    elseif result ~= value then redis.call('SET', KEYS[i], result) end
  end
end
if ARGV[4] == '1' then redis.call('SET', KEYS[1], ARGV[1]) end
return #KEYS - 1
"""

#: KEYS: entries. ARGV: per entry its value as read, then its new value (empty deletes).
SWAP: Final = """
local done = 0
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[2 * i - 1] then
    if ARGV[2 * i] == '' then redis.call('DEL', KEYS[i]) else redis.call('SET', KEYS[i], ARGV[2 * i]) end
    done = done + 1
  end
end
return done
"""


class RedisBackend:
    """An index on a Redis or Valkey server.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with the ACL user and password when there is one.
        prefix: put before every key.
        cafile: CA certificates for ``rediss://``; empty takes the system's.
        timeout_seconds: for one exchange with the server.
        retries: further tries of one exchange when the connection fails, with growing pauses.
    """

    name = "redis"

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        prefix: str = "kvatlas",
        *,
        cafile: str = "",
        timeout_seconds: float = 2.0,
        retries: int = 4,
    ) -> None:
        self._url = url
        self._prefix = prefix.encode()
        self._blocks = self._prefix + f":v{SCHEMA}:b:".encode()
        self._positions = self._prefix + f":v{SCHEMA}:p:".encode()
        self._mark = self._prefix + f":v{SCHEMA}:mark".encode()
        self._client: Any = connect(url, cafile=cafile, timeout_seconds=timeout_seconds, retries=retries)
        self._apply = self._client.register_script(APPLY)
        self._swap = self._client.register_script(SWAP)
        self._updates = 0
        self._late = 0

    @property
    def _where(self) -> str:
        return where(self._url)

    async def start(self) -> None:
        """Reach the server once and note the schema.

        Raises:
            BackendError: no server answers there, or it refuses the user.
        """
        await self._asked(self._client.set(self._prefix + b":schema", str(SCHEMA)))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the packed holders of each key, empty bytes where nobody holds it.

        Raises:
            BackendError: the server does not answer.
        """
        blocks = self._blocks
        names = [blocks + key for key in keys]
        if len(names) <= _MGET:
            found = await self._asked(self._client.mget(names)) if names else []
            return [value or b"" for value in found]
        pipeline = self._client.pipeline(transaction=False)
        for part in slices(names, _MGET):
            pipeline.mget(part)
        return [value or b"" for part in await self._asked(pipeline.execute()) for value in part]

    async def apply(self, record: BlocksRecord) -> None:
        """Apply a record of updates; one that was applied before changes nothing.

        Raises:
            BackendError: the server does not answer; apply the record again, its part that got through does no harm.
        """
        keys = block_keys_of(record)
        at = 0
        for run in record.runs:
            end = at + run.updates
            position = _POSITION.pack(incarnation_of(run.epoch), run.last_sequence)
            continues = b"1" if run.first_sequence > run.last_sequence else b"0"
            names = [self._positions + run.pod_ref.to_bytes(8, "big")]
            applied = 0
            for start in range(at, end, _CHUNK):
                stop = min(start + _CHUNK, end)
                # The position moves with the last piece, so a record that was cut off is applied again as a whole.
                moves = b"1" if stop == end else b"0"
                applied += await self._asked(
                    self._apply(
                        keys=names + [self._blocks + key for key in keys[start:stop]],
                        args=[
                            position,
                            record.ops[start:stop],
                            record.holders[start * 24 : stop * 24],
                            moves,
                            continues,
                        ],
                    )
                )
            self._updates += applied
            self._late += run.updates - applied
            at = end

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:
        """Remove the entries of a pod's ended epochs, a slice at a time; other writers go on meanwhile.

        Raises:
            BackendError: the server does not answer.
        """
        dropped = cursor = 0
        skip = len(self._blocks)
        while True:
            cursor, names = await self._asked(self._client.scan(cursor, match=escaped(self._blocks), count=_CHUNK))
            values = await self._asked(self._client.mget(names)) if names else []
            items = {name[skip:]: value for name, value in zip(names, values, strict=True) if value}
            found = sweep_index(items.items(), {pod_ref: (valid_from, gpu_valid_from)})
            changed = {**found.puts, **dict.fromkeys(found.deletes, b"")}
            if changed:
                pairs = [part for key, value in changed.items() for part in (items[key], value)]
                await self._asked(self._swap(keys=[self._blocks + key for key in changed], args=pairs))
            dropped += found.dropped
            if not cursor:
                return dropped

    async def read_mark(self) -> bytes | None:
        """Return the mark that was written under this prefix, None without one.

        Raises:
            BackendError: the server does not answer.
        """
        found: bytes | None = await self._asked(self._client.get(self._mark))
        return found

    async def write_mark(self, mark: bytes) -> None:
        """Write a mark that tells this index from any other.

        Raises:
            BackendError: the server does not answer.
        """
        await self._asked(self._client.set(self._mark, mark))

    async def stats(self) -> Stats:
        """Return what it says of itself; entries and bytes are the whole database's."""
        entries = await self._asked(self._client.dbsize())
        memory = await self._asked(self._client.info("memory"))
        return Stats(
            backend=self.name,
            entries=int(entries),
            bytes=int(memory.get("used_memory", -1)),
            updates=self._updates,
            late=self._late,
        )

    async def _asked(self, answer: Awaitable[_T]) -> _T:
        try:
            return await answer
        except (TimeoutError, RedisError, OSError) as error:
            raise BackendError(
                f"redis backend at {self._where}: {type(error).__name__}: {error}; check the address, the user and "
                "whether the server is up"
            ) from error
