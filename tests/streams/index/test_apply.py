"""The index: positions of pods, runs that come late or twice, and the sweep."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.validity import Validity
from kvatlas.streams.index.apply import apply_blocks, is_meta, meta_key, position, sweep_index
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord, Run
from kvatlas.streams.index.holders import add_holder, pack_holder, remove_holder
from kvatlas.streams.index.view import DictView

K1, K2 = b"1" * 16, b"2" * 16
FIRST = epoch_of(1)


def _holder(pod=1, tier=Tier.GPU, epoch=FIRST, group=0):
    return pack_holder(pod, group, int(tier), 0, 0, epoch)


def _record(sequence, *changes, pod=1, epoch=FIRST, first=None):
    """Return a record of one run: changes are (op, key, holder)."""
    run = Run(pod, epoch, sequence if first is None else first, sequence, len(changes))
    ops, keys, held = zip(*changes, strict=True)
    return BlocksRecord((run,), b"".join(keys), bytes(ops), b"".join(held), 0)


def _apply(view, *records):
    counts = Counter()
    for record in records:
        apply_blocks(view, record, counts)
    return counts


def test_a_pods_position_has_these_bytes():
    """A meta key of 12 bytes, which no block key can be, with incarnation and sequence."""
    view = DictView()
    _apply(view, _record(7, (OP_ADD, K1, _holder()), epoch=epoch_of(3, 2)))
    assert view.get(b"\x00pod" + (1).to_bytes(8, "big")) == (3).to_bytes(8, "big") + (7).to_bytes(8, "big")
    assert position(view, 1) == (3, 7)
    assert position(view, 2) == (-1, -1)
    assert is_meta(meta_key(1))
    assert not is_meta(K1)


def test_a_run_that_was_applied_or_passed_is_dropped():
    """Sequence 5 again, or 4 after it, changes nothing; another pod's run is not touched by it."""
    view = DictView()
    add, remove = (OP_ADD, K1, _holder()), (OP_REMOVE, K1, _holder())
    counts = _apply(view, _record(5, add), _record(5, remove), _record(4, remove))
    assert view.get(K1) == _holder()
    assert (counts["runs"], counts["runs_late"], counts["updates_late"]) == (1, 2, 2)
    _apply(view, _record(1, (OP_ADD, K1, _holder(2)), pod=2))
    assert view.get(K1) == _holder() + _holder(2)


def test_positions_compare_incarnations_before_sequences_and_ignore_clears():
    """A new incarnation begins at 0; a clear does not begin anything."""
    view = DictView()
    counts = _apply(
        view,
        _record(9, (OP_ADD, K1, _holder()), epoch=epoch_of(1, 5)),
        _record(0, (OP_ADD, K2, _holder(epoch=epoch_of(2))), epoch=epoch_of(2)),
        _record(10, (OP_REMOVE, K2, _holder(epoch=epoch_of(9))), epoch=epoch_of(1, 9)),
        _record(0, (OP_REMOVE, K2, _holder(epoch=epoch_of(9))), epoch=epoch_of(2, 3)),
    )
    assert counts["runs_late"] == 2
    assert view.get(K2) == _holder(epoch=epoch_of(2))


def test_a_run_goes_on_in_the_next_record():
    """A piece whose first sequence is past its last belongs to the record before, and may be repeated."""
    view = DictView()
    head = _record(5, (OP_ADD, K1, _holder()))
    piece = _record(5, (OP_ADD, K2, _holder()), first=6)
    counts = _apply(view, head, piece, head, piece)
    assert {K1, K2} <= view.values.keys()
    assert counts["runs_late"] == 1
    _apply(view, _record(6, (OP_REMOVE, K2, _holder())), piece)
    assert view.get(K2) is None


def test_updates_that_change_nothing_are_not_written():
    """A holder that is there, or a removal of one that is not, costs no write."""
    view = DictView()
    counts = _apply(
        view, _record(1, (OP_ADD, K1, _holder())), _record(2, (OP_ADD, K1, _holder()), (OP_REMOVE, K2, _holder()))
    )
    assert (counts["updates"], counts["unchanged"]) == (3, 2)


def test_a_removal_of_an_older_epoch_leaves_a_newer_holder():
    """Also when it is the only one."""
    view = DictView()
    newer = _holder(epoch=epoch_of(1, 4))
    _apply(view, _record(1, (OP_ADD, K1, newer)), _record(2, (OP_REMOVE, K1, _holder(epoch=epoch_of(1, 3)))))
    assert view.get(K1) == newer
    _apply(view, _record(3, (OP_REMOVE, K1, newer)))
    assert view.get(K1) is None


operations = st.tuples(
    st.sampled_from([OP_ADD, OP_REMOVE]),
    st.sampled_from([K1, K2]),
    st.builds(
        _holder,
        pod=st.just(1),
        tier=st.sampled_from([Tier.GPU, Tier.CPU]),
        epoch=st.sampled_from([epoch_of(1), epoch_of(1, 1)]),
    ),
)


@given(st.lists(st.lists(operations, min_size=1, max_size=5), min_size=1, max_size=8), st.data())
def test_a_repeated_stretch_of_the_log_ends_in_the_same_state(messages, data):
    """Any suffix, also cut into other runs than before, leaves the same bytes."""
    once = DictView()
    _apply(once, *[_record(number, *message) for number, message in enumerate(messages)])
    again = DictView(dict(once.values))
    start = data.draw(st.integers(0, len(messages) - 1))
    extra = data.draw(st.integers(0, 2))
    merged = [change for message in messages[start:] for change in message]
    # A flush that was cut off and made again is one run that reaches past what was applied of it.
    longer = _record(len(messages) - 1 + extra, *merged, first=start)
    _apply(again, longer)
    for key in (K1, K2):
        assert again.get(key) == once.get(key)


def test_the_sweep_drops_what_no_reader_sees():
    """Holders before valid_from, GPU holders before gpu_valid_from, and those of removed pods; nothing else."""
    old, new = epoch_of(1), epoch_of(1, 1)
    shared = pack_holder(77, 0, int(Tier.SHARED), 0, 0, 0)
    items = [
        (K1, _holder(1, epoch=old) + _holder(2, epoch=old)),
        (K2, _holder(1, epoch=old)),
        (b"3" * 16, _holder(2, epoch=old) + _holder(2, Tier.CPU, old) + _holder(3, epoch=old) + shared),
        (b"4" * 16, _holder(1, epoch=new) + _holder(4, epoch=old)),
        (meta_key(1), b"\x00" * 16),
    ]
    swept = sweep_index(items, {1: Validity(new), 2: Validity(old, new), 3: Validity(gone=True)})
    assert swept.puts == {b"3" * 16: _holder(2, Tier.CPU, old) + shared}
    assert swept.deletes == [K1, K2]
    assert (swept.seen, swept.dropped) == (4, 5)


def test_the_sweep_forgets_positions_of_pods_that_are_gone_for_long():
    """A position goes when its pod has not been back since; others stay."""
    items = [(meta_key(ref), (7).to_bytes(8, "big") + bytes(8)) for ref in (1, 2, 3)]
    swept = sweep_index(items, {}, forget={1: 7, 2: 6})
    assert (swept.deletes, swept.dropped) == ([meta_key(1)], 1)


_CHANGES = st.lists(
    st.tuples(
        st.sampled_from([OP_ADD, OP_REMOVE]),
        st.integers(0, 3).map(lambda number: bytes([number]) * 16),
        st.builds(_holder, pod=st.integers(1, 2), tier=st.sampled_from([Tier.GPU, Tier.CPU]), epoch=st.integers(1, 2)),
    ),
    min_size=1,
    max_size=24,
)


@given(st.lists(_CHANGES, min_size=1, max_size=4))
def test_runs_do_what_their_updates_do_one_by_one(runs):
    """Stretches of one operation and one holder are applied at once: the same table, and as many updates unchanged."""
    view, table, unchanged = DictView(), {}, 0
    counts = _apply(view, *(_record(number, *changes) for number, changes in enumerate(runs)))
    for op, key, holder in (change for changes in runs for change in changes):
        old = table.get(key, b"")
        new = add_holder(old, holder) if op == OP_ADD else remove_holder(old, holder)
        unchanged += new == old
        table[key] = new
    del view.values[meta_key(1)]
    assert view.values == {key: value for key, value in table.items() if value}
    assert counts["unchanged"] == unchanged
