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

import asyncio
import struct
from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

from redis.exceptions import RedisError

from kvatlas.bridge.model.epochs import incarnation_of
from kvatlas.bridge.model.validity import Validity
from kvatlas.scorer.library.backends.base import Stats, slices
from kvatlas.scorer.library.backends.errors import BackendError, IndexLostError
from kvatlas.streams.index.apply import Validities, block_keys_of, sweep_index
from kvatlas.streams.index.blocks_record import BlocksRecord
from kvatlas.streams.index.holders import readable
from kvatlas.streams.mirror.redis_link import connect, escaped, where

SCHEMA: Final = 1
_CHUNK: Final = 1_000
_MGET: Final = 1_024
_POSITION: Final = struct.Struct(">QQ")
_T = TypeVar("_T")

#: Order of byte strings of one length. Lua's own follows the server's locale, in which bytes are letters.
_BELOW: Final = """
local function below(one, other)
  for i = 1, #one do
    local x, y = string.byte(one, i), string.byte(other, i)
    if x ~= y then return x < y end
  end
  return false
end
"""

#: KEYS: position, then one per update. ARGV: new position, ops, holders, "1" when the position moves with this piece,
#: "1" when the run goes on from the record before, position that must be there (empty: any). Returns the updates
#: applied: 0 for a late run, -1 when the server has lost what it had.
#: Holders are 24 bytes: 11 of identity, then kind and window, and the epoch from byte 17 on (Lua counts from 1).
APPLY: Final = (
    _BELOW
    + """
local function place(value, identity)
  local at = string.find(value, identity, 1, true)
  while at and (at - 1) % 24 ~= 0 do at = string.find(value, identity, at + 1, true) end
  if at then return at, true end
  local low, high = 0, #value / 24
  while low < high do
    local middle = math.floor((low + high) / 2)
    local there = string.sub(value, middle * 24 + 1, middle * 24 + 11)
    if below(there, identity) then low = middle + 1 else high = middle end
  end
  return low * 24 + 1, false
end

local seen = redis.call('GET', KEYS[1])
if ARGV[6] ~= '' and (not seen or below(seen, ARGV[6])) then return -1 end
if seen and (below(ARGV[1], seen) or (seen == ARGV[1] and ARGV[5] ~= '1')) then return 0 end
local ops, packed = ARGV[2], ARGV[3]
for i = 2, #KEYS do
  local from = (i - 2) * 24
  local holder = string.sub(packed, from + 1, from + 24)
  local adds = string.byte(ops, i - 1) == 1
  local value = redis.call('GET', KEYS[i]) or ''
  local at, found = place(value, string.sub(holder, 1, 11))
  local result = value
  if found then
    if not below(string.sub(holder, 17, 24), string.sub(value, at + 16, at + 23)) then
      result = string.sub(value, 1, at - 1) .. (adds and holder or '') .. string.sub(value, at + 24)
    end
  elseif adds then
    result = string.sub(value, 1, at - 1) .. holder .. string.sub(value, at)
  end
  if result ~= value then
    if result == '' then redis.call('DEL', KEYS[i]) else redis.call('SET', KEYS[i], result) end
  end
end
if ARGV[4] == '1' then redis.call('SET', KEYS[1], ARGV[1]) end
return #KEYS - 1
"""
)

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
        password_file: file that holds the password, so that the address need not.
        timeout_seconds: for one exchange with the server.
        retries: further tries of one exchange when the connection fails, with growing pauses.
        lookup_seconds: for one lookup with all its tries; a score must not wait for a server that hangs.

    Attributes:
        positions: pod ref -> position that the server has acknowledged; it must never be behind it.
        lost: the server was found to be: it was emptied, or came back with an older state.

    Raises:
        SettingsError: the address or the password file cannot be used.
    """

    name = "redis"

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        prefix: str = "kvatlas",
        *,
        cafile: str = "",
        password_file: str = "",
        timeout_seconds: float = 2.0,
        retries: int = 4,
        lookup_seconds: float = 1.0,
    ) -> None:
        self.positions: dict[int, bytes] = {}
        self.lost = False
        self._url = url
        self._lookup_seconds = lookup_seconds
        self._prefix = prefix.encode()
        self._blocks = self._prefix + f":v{SCHEMA}:b:".encode()
        self._positions = self._prefix + f":v{SCHEMA}:p:".encode()
        self._mark = self._prefix + f":v{SCHEMA}:mark".encode()
        self._marked: bytes | None = None
        self._client: Any = connect(
            url, cafile=cafile, password_file=password_file, timeout_seconds=timeout_seconds, retries=retries
        )
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

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the packed holders of each key: empty where nobody holds it, None where that is lost for now.

        Raises:
            BackendError: the server does not answer in ``lookup_seconds``.
        """
        blocks = self._blocks
        names = [blocks + key for key in keys]
        found = await self._asked(asyncio.wait_for(self._values(names), self._lookup_seconds))
        absent = None if self.lost else b""
        return [readable(value, absent) for value in found]

    async def _values(self, names: list[bytes]) -> list[bytes | None]:
        if len(names) <= _MGET:
            return list(await self._client.mget(names)) if names else []
        pipeline = self._client.pipeline(transaction=False)
        for part in slices(names, _MGET):
            pipeline.mget(part)
        return [value for part in await pipeline.execute() for value in part]

    async def apply(self, record: BlocksRecord) -> None:
        """Apply a record of updates; one that was applied before changes nothing.

        Raises:
            IndexLostError: the server has lost what it had acknowledged; nothing of this run is applied.
            BackendError: the server does not answer; apply the record again, its part that got through does no harm.
        """
        keys = block_keys_of(record)
        at = 0
        for run in record.runs:
            end = at + run.updates
            position = _POSITION.pack(incarnation_of(run.epoch), run.last_sequence)
            continues = b"1" if run.first_sequence > run.last_sequence else b"0"
            names = [self._position_name(run.pod_ref)]
            known = self.positions.get(run.pod_ref, b"")
            applied = 0
            for start in range(at, end, _CHUNK):
                stop = min(start + _CHUNK, end)
                # The position moves with the last piece, so a record that was cut off is applied again as a whole.
                moves = b"1" if stop == end else b"0"
                done = await self._asked(
                    self._apply(
                        keys=names + [self._blocks + key for key in keys[start:stop]],
                        args=[
                            position,
                            record.ops[start:stop],
                            record.holders[start * 24 : stop * 24],
                            moves,
                            continues,
                            known,
                        ],
                    )
                )
                if done < 0:
                    raise self._loses()
                applied += done
            if applied:
                self.positions[run.pod_ref] = position
            self._updates += applied
            self._late += run.updates - applied
            at = end

    def _position_name(self, pod_ref: int) -> bytes:
        return self._positions + pod_ref.to_bytes(8, "big")

    # --- a server that forgot -------------------------------------------------------------------------------------

    def _loses(self) -> IndexLostError:
        self.lost = True
        return IndexLostError(
            f"redis backend at {self._where}: the server was emptied or came back with an older state"
        )

    async def check(self) -> None:
        """Look whether the server still has what it acknowledged.

        Raises:
            IndexLostError: it has not.
            BackendError: the server does not answer.
        """
        known = dict(self.positions)
        if not known:
            return
        found = await self._asked(self._client.mget([self._position_name(ref) for ref in known]))
        # Redis evicting or expiring a position is a loss too: what else has gone with it nobody knows.
        if any(value is None or value < known[ref] for ref, value in zip(known, found, strict=True)):
            raise self._loses()

    async def begin_anew(self) -> None:
        """Remove everything under the prefix; until :meth:`whole` absent keys have no answer.

        Raises:
            BackendError: the server does not answer; call it again.
        """
        self.lost = True
        self.positions.clear()
        for names in (self._blocks, self._positions):
            cursor = 0
            while True:
                cursor, found = await self._asked(self._client.scan(cursor, match=escaped(names), count=_CHUNK))
                if found:
                    await self._asked(self._client.unlink(*found))
                if not cursor:
                    break
        if self._marked is not None:
            await self.write_mark(self._marked)

    def whole(self) -> None:
        """Mark the index complete: absent keys mean "not held" again."""
        self.lost = False

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:
        """Remove the entries of a pod's ended epochs.

        Raises:
            BackendError: the server does not answer.
        """
        return await self.drop_epochs({pod_ref: Validity(valid_from, gpu_valid_from)})

    async def drop_epochs(self, valid: Validities) -> int:
        """The same for several pods in one pass, a slice at a time; other writers go on meanwhile.

        Raises:
            BackendError: the server does not answer.
        """
        dropped = cursor = 0
        skip = len(self._blocks)
        while True:
            cursor, names = await self._asked(self._client.scan(cursor, match=escaped(self._blocks), count=_CHUNK))
            values = await self._asked(self._client.mget(names)) if names else []
            items = {name[skip:]: value for name, value in zip(names, values, strict=True) if value}
            found = sweep_index(items.items(), valid)
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
        self._marked = await self._asked(self._client.get(self._mark))
        return self._marked

    async def write_mark(self, mark: bytes) -> None:
        """Write a mark that tells this index from any other.

        Raises:
            BackendError: the server does not answer.
        """
        self._marked = mark
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
