"""Writing and reading segment files: every byte that comes back was checked against its checksum."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import xxhash

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers, Corrupt, Missing, Written, copy_in, copy_out, payload_sum
from kvatlas.connector.files.buffers import AlignedPool, is_aligned
from kvatlas.connector.files.fs import IOV_MAX, O_DIRECT, Buffer, FileSystem, read_full, write_full
from kvatlas.connector.files.gate import IoGate
from kvatlas.connector.files.layout import ALIGNMENT, Header, Slot, round_up

#: Bytes that are read at a time where only a checksum is wanted.
_VERIFY_BYTES: Final = 1 << 20


class SegmentFiles:
    """Segments below one fingerprint's directory.

    Args:
        fs: the file system.
        directory: the fingerprint's directory; its subdirectories exist.
        fingerprint: 16 bytes every header carries.
        direct: use direct I/O (the directory was probed for it).
        fsync: bring a segment to the medium before it gets its names.
        pool: aligned memory for headers and for payloads that direct I/O cannot take as they lie.
        gate: how many transfers may be in I/O at once; checksums are computed outside it.
        writer: makes temporary names unique among processes that share the directory.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        fingerprint: bytes,
        *,
        direct: bool,
        fsync: bool,
        pool: AlignedPool,
        gate: IoGate,
        writer: str,
    ) -> None:
        self._fs = fs
        self._blocks = f"{directory}/"
        self._staging = str(directory / layout.STAGING)
        self._quarantine = str(directory / layout.QUARANTINE)
        self._fingerprint = fingerprint
        self._direct = direct
        self._flags = O_DIRECT if direct else 0
        self._fsync = fsync
        self._pool = pool
        self._gate = gate
        self._writer = writer
        self._numbers = itertools.count()
        self._made: set[str] = set()

    def path(self, key: bytes) -> str:
        """Return the name of a block's file."""
        return self._blocks + layout.block_path(key)

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self, blocks: Sequence[BlockBuffers]) -> Written:
        """Write blocks as one segment and publish it under each block's name.

        The file is complete before its first name appears. A failure before that leaves nothing but, at worst, a
        temporary file; a failure between two names leaves the earlier blocks published, each of them whole.

        Raises:
            OSError: the system refused; ``published`` on it lists the keys that made it.
        """
        slot_bytes = round_up(max(block.size_bytes for block in blocks))
        slots = [Slot(block.key, block.size_bytes, payload_sum(block.parts)) for block in blocks]
        header = layout.encode_header(self._fingerprint, os.urandom(16), slot_bytes, slots)
        self._ensure(self._staging)
        temporary = f"{self._staging}/{self._writer}-{next(self._numbers)}.tmp"
        size = len(header) + slot_bytes * len(blocks)
        try:
            with self._gate.writing():
                fd = self._fs.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | self._flags)
                try:
                    self._write_body(fd, header, slot_bytes, blocks)
                    if self._fsync:
                        self._fs.fsync(fd)
                    found = self._fs.fstat(fd)
                finally:
                    self._fs.close(fd)
            if found.st_size != size:
                raise OSError(errno.EIO, f"segment has {found.st_size} bytes after writing {size}")
            keys = self._publish(temporary, [block.key for block in blocks])
        except BaseException:
            # A directory may have been taken away from under us; the next write makes it again.
            self._made.clear()
            with contextlib.suppress(OSError):
                self._fs.unlink(temporary)
            raise
        return Written(found.st_ino, size, keys)

    def _write_body(self, fd: int, header: bytes, slot_bytes: int, blocks: Sequence[BlockBuffers]) -> None:
        bounced = [self._direct and not self._fits(block, slot_bytes) for block in blocks]
        with self._pool.take(len(header) + slot_bytes * sum(bounced)) as memory:
            memory[: len(header)] = header
            pieces: list[Buffer] = [memory[: len(header)]]
            at = len(header)
            for block, bounce in zip(blocks, bounced, strict=True):
                if bounce:
                    slot = memory[at : at + slot_bytes]
                    at += slot_bytes
                    copy_in(slot, block.parts)
                    pieces.append(slot)
                else:
                    pieces.extend(block.parts)
                    padding = slot_bytes - block.size_bytes
                    if padding:
                        pieces.append(memoryview(bytes(padding)))
            write_full(self._fs, fd, pieces, 0)
            pieces.clear()

    @staticmethod
    def _fits(block: BlockBuffers, slot_bytes: int) -> bool:
        return block.size_bytes == slot_bytes and all(is_aligned(part) for part in block.parts)

    def _publish(self, temporary: str, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        """Give the file its names; the last one by renaming, which also removes the temporary name."""
        done: list[bytes] = []
        try:
            for number, key in enumerate(keys):
                target = self.path(key)
                self._ensure(target.rpartition("/")[0])
                if number == len(keys) - 1:
                    self._fs.replace(temporary, target)
                else:
                    # A link cannot replace a name, so it gets a passing one and is renamed over.
                    passing = f"{temporary[:-4]}.{number}.tmp"
                    self._fs.link(temporary, passing)
                    try:
                        self._fs.replace(passing, target)
                    except OSError:
                        with contextlib.suppress(OSError):
                            self._fs.unlink(passing)
                        raise
                done.append(key)
        except OSError as error:
            error.published = tuple(done)  # type: ignore[attr-defined]
            raise
        return tuple(done)

    def _ensure(self, parent: str) -> None:
        if parent not in self._made:
            self._fs.mkdir(parent)
            self._made.add(parent)

    # -- reading ---------------------------------------------------------------------------------------------

    def read(self, block: BlockBuffers) -> None:
        """Fill a block's buffers; returning means that every byte verified.

        Raises:
            Missing: there is no such file.
            Corrupt: there is, and it is not this block; the buffers are undefined.
            OSError: the system failed; the buffers are undefined.
        """
        with contextlib.ExitStack() as held:
            with self._gate.reading(), self._opened(block.key) as (fd, info):
                slot, memory = self._fetch(fd, info, block, held)
            self._finish(block, slot, memory, info.st_ino)

    def _fetch(
        self, fd: int, info: os.stat_result, block: BlockBuffers, held: contextlib.ExitStack
    ) -> tuple[Slot, Buffer | None]:
        """Read a block's slot into its buffers, or where direct I/O cannot, into memory that ``held`` gives back."""
        slot_bytes = round_up(block.size_bytes)
        in_place = not self._direct or self._fits(block, slot_bytes)
        if info.st_size == layout.header_bytes(1) + slot_bytes:
            return self._fetch_single(fd, info.st_ino, block, held, slot_bytes=slot_bytes, in_place=in_place)
        header = self._read_header(fd, info.st_ino, info.st_size)
        number = header.find(block.key)
        if number is None:
            raise Corrupt("the file holds other blocks", info.st_ino)
        slot = header.slots[number]
        self._check_length(slot, block.size_bytes)
        memory = None if in_place else held.enter_context(self._pool.take(slot_bytes))
        at = header.header_bytes + number * header.slot_bytes
        self._fill(fd, block.parts if memory is None else [memory], at, info.st_ino)
        return slot, memory

    def _fetch_single(
        self, fd: int, inode: int, block: BlockBuffers, held: contextlib.ExitStack, *, slot_bytes: int, in_place: bool
    ) -> tuple[Slot, Buffer | None]:
        """Read header and payload of a one-block segment with one call."""
        head = layout.header_bytes(1)
        memory = held.enter_context(self._pool.take(head if in_place else head + slot_bytes))
        page, rest = memory[:head], None if in_place else memory[head:]
        # The pool wants its memory back without views on it.
        held.callback(page.release)
        if rest is not None:
            held.callback(rest.release)
        self._fill(fd, [page, *(block.parts if rest is None else [rest])], 0, inode)
        header = self._decode(page, inode)
        if header.file_bytes != head + slot_bytes:
            raise Corrupt("the file's size is not what its header says", inode)
        if header.find(block.key) is None:
            raise Corrupt("the file holds other blocks", inode)
        self._check_length(header.slots[0], block.size_bytes)
        return header.slots[0], rest

    def read_whole(self, blocks: Sequence[BlockBuffers]) -> frozenset[bytes]:
        """Fill the buffers of blocks that are exactly one file's, in its order, with one call.

        Returns:
            The keys whose bytes verified; :meth:`read` says about each of the others, of which there may be many
            (the blocks lie otherwise) or one (it is damaged).

        Raises:
            Missing, Corrupt, OSError: as :meth:`read`, for all of them.
        """
        slot_bytes = round_up(blocks[0].size_bytes)
        head = layout.header_bytes(len(blocks))
        parts = [part for block in blocks for part in block.parts]
        even = all(block.size_bytes == slot_bytes for block in blocks) and len(parts) < IOV_MAX
        if not even or (self._direct and not all(map(is_aligned, parts))):
            return frozenset()
        with contextlib.ExitStack() as held:
            with self._gate.reading(), self._opened(blocks[0].key) as (fd, info):
                if info.st_size != head + slot_bytes * len(blocks):
                    return frozenset()
                page = held.enter_context(self._pool.take(head))
                self._fill(fd, [page, *parts], 0, info.st_ino)
            slots = self._decode(page, info.st_ino).slots
        return frozenset(
            block.key
            for block, slot in zip(blocks, slots, strict=False)
            if slot.key == block.key and slot.length == block.size_bytes and payload_sum(block.parts) == slot.sum
        )

    @staticmethod
    def _finish(block: BlockBuffers, slot: Slot, memory: Buffer | None, inode: int) -> None:
        parts = block.parts if memory is None else [memory[: slot.length]]
        if payload_sum(parts) != slot.sum:
            raise Corrupt("payload checksum is wrong", inode)
        if memory is not None:
            copy_out(memory, block.parts)

    def probe(self, key: bytes) -> Written:
        """Return the segment behind a block's name after checking its header and size, not its payload.

        Raises:
            Missing, Corrupt, OSError: as :meth:`read`.
        """
        with self._opened(key) as (fd, info):
            header = self._read_header(fd, info.st_ino, info.st_size)
            if header.find(key) is None:
                raise Corrupt("the file holds other blocks", info.st_ino)
            return Written(info.st_ino, info.st_size, tuple(slot.key for slot in header.slots))

    def verify(self, key: bytes, size: int) -> None:
        """Check a stored block of ``size`` bytes against its checksum, as a load would, with little memory.

        Raises:
            Missing, Corrupt, OSError: as :meth:`read`.
        """
        with self._gate.reading(), self._opened(key) as (fd, info):
            header = self._read_header(fd, info.st_ino, info.st_size)
            number = header.find(key)
            if number is None:
                raise Corrupt("the file holds other blocks", info.st_ino)
            slot = header.slots[number]
            self._check_length(slot, size)
            begin = header.header_bytes + number * header.slot_bytes
            total = xxhash.xxh3_64()
            with self._pool.take(_VERIFY_BYTES) as memory:
                for done in range(0, size, _VERIFY_BYTES):
                    with memory[: min(round_up(size - done), _VERIFY_BYTES)] as part:
                        self._fill(fd, [part], begin + done, info.st_ino)
                        total.update(part[: size - done])
            if total.intdigest() != slot.sum:
                raise Corrupt("payload checksum is wrong", info.st_ino)

    def _opened(self, key: bytes) -> AbstractContextManager[tuple[int, os.stat_result]]:
        return _open(self._fs, self.path(key), os.O_RDONLY | self._flags)

    def _read_header(self, fd: int, inode: int, file_bytes: int) -> Header:
        with self._pool.take(ALIGNMENT) as page:
            self._fill(fd, [page], 0, inode)
            try:
                size = layout.peek_header_bytes(page)
            except LayoutError as error:
                raise Corrupt(str(error), inode) from error
            if size == ALIGNMENT:
                header = self._decode(page, inode)
        if size > ALIGNMENT:
            with self._pool.take(size) as pages:
                self._fill(fd, [pages], 0, inode)
                header = self._decode(pages, inode)
        if header.file_bytes != file_bytes:
            raise Corrupt(f"file has {file_bytes} bytes, its header says {header.file_bytes}", inode)
        return header

    def _decode(self, data: Buffer, inode: int) -> Header:
        try:
            return layout.decode_header(data, self._fingerprint)
        except LayoutError as error:
            raise Corrupt(str(error), inode) from error

    @staticmethod
    def _check_length(slot: Slot, size: int) -> None:
        # The header is whole, so the file is a good block that the caller asks for in another size.
        if slot.length != size:
            raise Missing(f"the stored block has {slot.length} bytes, {size} are wanted")

    def _fill(self, fd: int, parts: Sequence[Buffer], offset: int, inode: int) -> None:
        wanted = sum(len(part) for part in parts)
        got = read_full(self._fs, fd, parts, offset)
        if got != wanted:
            raise Corrupt(f"file ends after {offset + got} bytes, {offset + wanted} are needed", inode)

    # -- removing --------------------------------------------------------------------------------------------

    def remove(self, key: bytes, inode: int | None = None) -> bool:
        """Take a block's name away; False when it was gone, or leads to another file than ``inode``.

        Raises:
            OSError: the system refused.
        """
        path = self.path(key)
        try:
            if inode is not None and self._fs.stat(path).st_ino != inode:
                return False
            self._fs.unlink(path)
        except FileNotFoundError:
            return False
        return True

    def quarantine(self, key: bytes, inode: int) -> bool:
        """Move a file that did not verify out of the way; False when it is gone or replaced already.

        Raises:
            OSError: it can be neither moved nor removed.
        """
        path = self.path(key)
        try:
            if self._fs.stat(path).st_ino != inode:
                return False
            target = f"{self._quarantine}/{key.hex()}.{self._writer}-{next(self._numbers)}"
            try:
                self._fs.replace(path, target)
            except FileNotFoundError:
                return False
            except OSError:
                self._fs.unlink(path)
        except FileNotFoundError:
            return False
        return True


@contextlib.contextmanager
def _open(fs: FileSystem, path: str, flags: int) -> Iterator[tuple[int, os.stat_result]]:
    try:
        fd = fs.open(path, flags)
    except FileNotFoundError as error:
        raise Missing("no such block") from error
    try:
        yield fd, fs.fstat(fd)
    finally:
        fs.close(fd)
