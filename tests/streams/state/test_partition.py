"""Tests of a table's local state."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas.bridge.errors import VersionError
from kvatlas.streams.errors import GoneError, StoreError
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta, encode_meta
from kvatlas.streams.state.damage import full_disk
from kvatlas.streams.state.database import RocksBudget, open_database
from kvatlas.streams.state.partition import OFFSET_KEY, PartitionState, Role


@pytest.fixture
def budget() -> RocksBudget:
    return RocksBudget(1 << 20, 8 << 20)


def state_of(folder: Path, budget: RocksBudget) -> PartitionState:
    return PartitionState(3, folder / "t-3.db", budget, 1 << 20)


def test_meta_record_bytes() -> None:
    """The meta record is what its drawing says, and another version is refused."""
    packed = encode_meta(Meta(7, 8, 9, 10, 11))
    assert packed.hex() == "02" + "".join(f"{number:016x}" for number in (7, 8, 9, 10, 11))
    assert decode_meta(packed) == Meta(7, 8, 9, 10, 11)
    assert decode_meta(b"\x01" + packed[1:25]) == Meta(7, 8, 9, 0, 0)
    for other in (b"\x03" + packed[1:], packed[:25], b""):
        with pytest.raises(VersionError):
            decode_meta(other)


def test_a_flush_and_its_offsets_survive_a_reopen(tmp_path: Path, budget: RocksBudget) -> None:
    """Values, changelog offset and source offset are written together and found again."""
    state = state_of(tmp_path, budget)
    assert (state.changelog_offset, state.meta.source_offset, state.role) == (None, -1, Role.RESTORING)
    state.write({b"a": b"1", b"b": b"2"}, 41, Meta(17, 5, 6))
    state.write({b"b": None}, 43, Meta(18, 5, 6))
    state.close()
    again = state_of(tmp_path, budget)
    assert (again.changelog_offset, again.meta) == (43, Meta(18, 5, 6))
    assert again.get_many([b"a", b"b", b"c"]) == [b"1", None, None]
    assert list(again.items()) == [(b"a", b"1")]
    again.close()


def test_the_changelog_offset_is_under_the_key_that_every_version_has(tmp_path: Path, budget: RocksBudget) -> None:
    """The offset is stored as decimal text: state folders of earlier versions are read."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1"}, 41, Meta(1, 2, 3))
    assert state.fetch([OFFSET_KEY, META_KEY]) == [b"41", encode_meta(Meta(1, 2, 3))]
    state.close()


def test_loading_the_changelog_keeps_the_cache_coherent(tmp_path: Path, budget: RocksBudget) -> None:
    """A restore changes cached entries, removes removed ones, and takes the meta record over."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1", b"b": b"2"}, 1, Meta(1, 0, 0))
    state.load([(b"a", b"9"), (b"b", None), (b"c", b"3"), (META_KEY, encode_meta(Meta(5, 0, 0)))], 5)
    assert state.get_many([b"a", b"b", b"c"]) == [b"9", None, b"3"]
    assert (state.changelog_offset, state.meta.source_offset) == (5, 5)
    state.close()


def test_a_locked_folder_is_an_error_that_names_it(
    tmp_path: Path, budget: RocksBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two owners of one folder are refused."""
    monkeypatch.setattr("kvatlas.streams.state.database._OPEN_RETRIES", 2)
    state = state_of(tmp_path, budget)
    with pytest.raises(StoreError, match=r"t-3\.db"):
        open_database(tmp_path / "t-3.db", budget)
    state.close()


def test_a_damaged_state_is_thrown_away(tmp_path: Path, budget: RocksBudget) -> None:
    """The changelog has it all: a worker whose files are broken starts empty and does not stay away."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1"}, 41, Meta(17, 5, 6))
    state.close()
    (state.path / "CURRENT").write_bytes(b"junk")
    with pytest.raises(StoreError, match="Corruption"):
        open_database(state.path, budget)
    again = state_of(tmp_path, budget)
    assert (again.get(b"a"), again.changelog_offset, again.meta) == (None, None, Meta())
    again.write({b"b": b"2"}, 1, Meta(1, 0, 0))
    again.close()


async def test_who_still_works_on_a_closed_partition_learns_that_it_is_gone(
    tmp_path: Path, budget: RocksBudget
) -> None:
    """A rebalance closes partitions under sweeps, counts and followers: an error that they can tell from others."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1"}, 1, Meta(1, 0, 0))
    state.close()
    state.close()
    for work in (
        lambda: state.get(b"b"),
        lambda: list(state.items()),
        lambda: state.load([(b"a", b"2")], 2),
        lambda: state.write({b"a": b"2"}, 2, Meta(2, 0, 0)),
    ):
        with pytest.raises(GoneError, match=r"t-3\.db"):
            work()
    with pytest.raises(GoneError):
        await state.write_apart({b"%d" % number: b"" for number in range(1000)}, 2, Meta(2, 0, 0))
    assert (state.changelog_offset, GoneError("").retriable) == (1, True)


def test_a_wiped_state_is_empty(tmp_path: Path, budget: RocksBudget) -> None:
    """Nothing of the former state is left, offsets included."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1"}, 1, Meta(1, 0, 0))
    state.wipe()
    assert (state.get(b"a"), state.changelog_offset, state.meta) == (None, None, Meta())
    state.close()


def test_an_overlay_reads_its_own_writes_and_leaves_the_state_alone(tmp_path: Path, budget: RocksBudget) -> None:
    """Writes gather in the overlay; a prefetch changes nothing that is read."""
    state = state_of(tmp_path, budget)
    state.write({b"a": b"1", b"b": b"2"}, 1, Meta(1, 0, 0))
    state.cache.clear()
    view = state.overlay
    view.prefetch([b"a", b"b", b"absent"])
    view.put(b"a", b"9")
    view.delete(b"b")
    view.put(b"new", b"3")
    assert [view.get(key) for key in (b"a", b"b", b"new", b"absent")] == [b"9", None, b"3", None]
    assert state.get_many([b"a", b"b", b"new"]) == [b"1", b"2", None]
    assert view.cut().writes == {b"a": b"9", b"b": None, b"new": b"3"}
    state.close()


def test_a_full_disk_is_named_with_its_folder_and_what_to_do() -> None:
    """RocksDB's words are found among the causes of whatever the app died of; other errors are not taken for it."""
    cause = Exception("IO error: No space left on device: While appending to file: /s/engine_blocks-1.db/000058.sst")
    crash = RuntimeError("the task ended")
    crash.__cause__ = cause
    found = full_disk(crash, "/s")
    assert found is not None
    assert "state_dir /s" in str(found)
    assert "000058.sst" in str(found)
    assert not found.restart_helps
    assert full_disk(RuntimeError("something else"), "/s") is None
