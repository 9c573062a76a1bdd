"""Local state that RocksDB cannot open or read: set aside, bounded, and begun anew; nothing else is taken for it."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from kvatlas.streams.errors import DamagedError, StateFolderError, StoreError
from kvatlas.streams.startup import worker_id
from kvatlas.streams.state import damage
from kvatlas.streams.state.changelog import META_KEY, Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import OFFSET_KEY, PartitionState

KEYS = [b"%06d" % number for number in range(6000)]


def opened(path: Path, failed: list[StoreError] | None = None) -> PartitionState:
    budget = RocksBudget(1 << 20, 8 << 20, on_failed=failed.append if failed is not None else lambda _: None)
    return PartitionState(0, path, budget, 0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A closed table of three files."""
    path = tmp_path / "v1" / "tables" / "t-0.db"
    state = opened(path)
    for turn in range(3):
        state.write({key: os.urandom(48) for key in KEYS[turn::3]}, turn, Meta(turn, 0, 0))
        state._db.raw.flush()
    state.close()
    return path


def sst(path: Path) -> Path:
    return sorted(path.glob("*.sst"))[1]


def changed(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("what is this?")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "sst missing": lambda path: sst(path).unlink(),
    "sst truncated": lambda path: changed(sst(path), lambda data: data[: len(data) // 2]),
    "sst empty": lambda path: changed(sst(path), lambda _: b""),
    "sst zeroed": lambda path: changed(sst(path), lambda data: bytes(len(data))),
    "sst a folder": lambda path: folder_instead(sst(path)),
    "manifest missing": lambda path: next(path.glob("MANIFEST*")).unlink(),
    "manifest damaged": lambda path: changed(
        next(path.glob("MANIFEST*")), lambda data: data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :]
    ),
    "manifest a folder": lambda path: folder_instead(next(path.glob("MANIFEST*"))),
    "current points nowhere": lambda path: (path / "CURRENT").write_text("MANIFEST-999999\n"),
    "current missing": lambda path: (path / "CURRENT").unlink(),
    "current a folder": lambda path: folder_instead(path / "CURRENT"),
    "lock a folder": lambda path: folder_instead(path / "LOCK"),
    "table a file": file_instead,
    "tables a file": lambda path: file_instead(path.parent),
    "tables' parent a file": lambda path: file_instead(path.parent.parent),
    "offset no number": lambda path: _write(path, OFFSET_KEY, b"\xff\xfe"),
    "meta no meta": lambda path: _write(path, META_KEY, b"1234"),
}


def _write(path: Path, key: bytes, value: bytes) -> None:
    state = opened(path)
    state._db.put(key, value)
    state.close()


@pytest.mark.parametrize("kind", DAMAGE)
def test_whatever_cannot_be_opened_is_begun_anew(table: Path, kind: str) -> None:
    """The state is empty, takes writes, and is found again by the next start."""
    DAMAGE[kind](table)
    state = opened(table)
    assert (state.get(KEYS[0]), state.changelog_offset, state.meta) == (None, None, Meta())
    state.write({b"a": b"1"}, 7, Meta(7, 0, 0))
    state.close()
    again = opened(table)
    assert (again.get(b"a"), again.changelog_offset) == (b"1", 7)
    again.close()


def test_what_was_damaged_is_kept_for_a_look(table: Path) -> None:
    """The folder is beside the tables under its name, with its files."""
    DAMAGE["manifest missing"](table)
    opened(table).close()
    (kept,) = (table.parent / damage.KEPT).iterdir()
    assert kept.name.startswith("t-0.db-")
    assert len(list(kept.glob("*.sst"))) == 3


def test_what_is_kept_is_bounded(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, and of one that is larger than all may be, its largest files."""
    for _ in range(7):
        (table / "CURRENT").write_text("nothing")
        opened(table).close()
    assert len(list((table.parent / damage.KEPT).iterdir())) == 4
    monkeypatch.setattr(damage, "_MOST_BYTES", 200_000)
    (table / "big").write_bytes(bytes(150_000))
    (table / "bigger").write_bytes(bytes(180_000))
    (table / "CURRENT").write_text("nothing")
    opened(table).close()
    names = {file.name for file in (table.parent / damage.KEPT).rglob("*") if file.is_file()}
    assert "big" in names
    assert "bigger" not in names


@pytest.mark.parametrize("what", ["get", "fetch", "items", "write"])
def test_a_bad_byte_found_while_running_ends_the_process_and_the_next_begins_anew(table: Path, what: str) -> None:
    """Reading, iterating and writing tell of it, once for the service; the next start sets the folder aside."""
    changed(
        sst(table), lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :]
    )
    failed: list[StoreError] = []
    state = opened(table, failed)

    def reads() -> None:
        if what == "get":
            for key in KEYS:
                state.get(key)
        elif what == "fetch":
            state.fetch(KEYS)
        elif what == "items":
            list(state.items())
        else:
            state._db.raw.compact_range(None, None)  # RocksDB finds it by itself and takes no more writes
            state.write({b"a": b"1"}, 9, Meta())

    with pytest.raises(DamagedError, match=r"t-0\.db") as caught:
        reads()
    for error in (caught.value, caught.value.__cause__):  # a process would end here, and its handles with it
        traceback.clear_frames(error and error.__traceback__)
    assert [type(error) for error in failed] == [DamagedError]
    state.close()
    again = opened(table)
    assert (again.get(KEYS[0]), again.changelog_offset) == (None, None)
    again.write({b"a": b"1"}, 7, Meta())
    again.close()
    last = opened(table)
    assert last.get(b"a") == b"1"  # once
    last.close()


def test_a_whole_table_is_read_to_its_end(table: Path) -> None:
    """The look for an end that is none changes nothing where all is well, also on an empty table and past the end."""
    state = opened(table)
    assert len(list(state.items())) == len(KEYS)
    assert list(state.items(b"\xff" * 8)) == []
    assert list(state.items(KEYS[-1])) != []
    state.wipe()
    assert list(state.items()) == []
    state.close()


@pytest.mark.parametrize(
    ("text", "kind", "helps"),
    [
        ("IO error: No space left on device: While appending to file: /s/000058.sst", StateFolderError, False),
        ("IO error: While open a file: /s/LOCK: Permission denied", StateFolderError, False),
        ("IO error: While open a file: /s/1.sst: Read-only file system", StateFolderError, False),
        ("IO error: While open a file: /s/1.sst: Too many open files", StoreError, True),
        ("IO error: lock hold by current process, acquire time 1: /s/LOCK: No locks available", StoreError, True),
        ("IO error: While lock file: /s/LOCK: Resource temporarily unavailable", StoreError, True),
        ("IO error: While pread offset 0 len 53: /s/1.sst: Input/output error", DamagedError, True),
        ("Corruption: block checksum mismatch", DamagedError, True),
        ("Invalid argument: leveldb.Other does not match existing comparator", DamagedError, True),
    ],
)
def test_what_an_error_means(text: str, kind: type[StoreError], helps: bool) -> None:
    """A lock, a right, a full disk and too few descriptors are no damage: the files are whole."""
    found = damage.meaning(Path("/s"), Exception(text))
    assert (type(found), found.restart_helps) == (kind, helps)
    assert "/s" in str(found)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"\xff\xfe\x00worker"),
        lambda path: path.mkdir(),
        lambda path: path.write_text("a\x00b"),
        lambda path: path.write_text("x" * 5000),
        lambda path: path.write_text(""),
    ],
    ids=["not utf-8", "a folder", "a zero byte", "too long", "empty"],
)
def test_a_worker_id_that_is_none_is_replaced(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """A new id is made and kept from then on."""
    spoil(tmp_path / "worker-id")
    made = worker_id(tmp_path)
    assert made
    assert made.isprintable()
    assert worker_id(tmp_path) == made


def test_a_state_folder_that_is_a_file_is_the_operators_mistake(tmp_path: Path) -> None:
    """Not ours to move: the error names it, and a restart does not help."""
    (tmp_path / "s").write_text("mine")
    with pytest.raises(StateFolderError, match="choose another state_dir") as caught:
        worker_id(tmp_path / "s")
    assert not caught.value.restart_helps
