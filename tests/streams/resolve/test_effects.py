"""Effects: columns per pod cut into one record per partition."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.index.apply import apply_blocks
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, decode_blocks
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve import effects as module
from kvatlas.streams.resolve.effects import Effects

HOLDER = pack_holder(7, 0, 1, 0, 0, 1 << 32)


def _rows(value):
    record = decode_blocks(value)
    return [
        (record.ops[n], record.keys[16 * n : 16 * n + 16], record.holders[24 * n : 24 * n + 24])
        for n in range(len(record.ops))
    ]


changes = st.lists(
    st.tuples(st.integers(1, 3), st.booleans(), st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=6)),
    max_size=20,
)


@given(changes, st.integers(1, 7))
def test_few_updates_make_the_same_records_as_many(script, partitions):
    """The loop for a few updates and the columns for many write the same bytes."""
    effects = Effects(partitions)
    for sequence, (pod, adds, keys) in enumerate(script):
        updates = effects.of(pod, epoch_of(1), sequence)
        (updates.add if adds else updates.remove)(keys, bytes([pod]) * 24)
    few = effects.encode(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", -1)
        assert effects.encode(5) == few


@given(changes)
def test_records_of_this_process_are_those_of_one_partition(script):
    """What is not encoded says what a decoded record of the only partition says."""
    effects = Effects(3)
    for sequence, (pod, adds, keys) in enumerate(script):
        updates = effects.of(pod, epoch_of(1), sequence)
        (updates.add if adds else updates.remove)(keys, HOLDER)
    made = effects.records()
    assert made == [decode_blocks(value) for value in module.encode(effects.segments, 1, 0).get(0, [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RECORD_UPDATES", 1 if script else 0)
        pieces = effects.records()
    for column in ("keys", "ops", "holders"):
        assert b"".join(getattr(one, column) for one in pieces) == b"".join(getattr(one, column) for one in made)


@given(changes, st.integers(1, 7))
def test_every_update_reaches_its_partition_in_the_pods_order(script, partitions):
    """Keys go where the partition rule says; one pod's updates keep their order; runs name their stretch."""
    effects = Effects(partitions)
    expected: dict[tuple[int, int], list[tuple[int, bytes, bytes]]] = {}
    for sequence, (pod, adds, keys) in enumerate(script):
        updates = effects.of(pod, epoch_of(1), sequence)
        holder = bytes([pod]) * 24
        (updates.add if adds else updates.remove)(keys, holder)
        for key in keys:
            row = (OP_ADD if adds else OP_REMOVE, key, holder)
            expected.setdefault((partition_of(key, partitions), pod), []).append(row)
    assert effects.updates == sum(len(rows) for rows in expected.values())
    found: dict[tuple[int, int], list[tuple[int, bytes, bytes]]] = {}
    sequences = {pod: [n for n, (p, _, _) in enumerate(script) if p == pod] for pod in (1, 2, 3)}
    for partition, values in effects.encode(5).items():
        for value in values:
            record, rows = decode_blocks(value), _rows(value)
            assert record.receive_ns == 5
            for run in record.runs:
                assert (run.first_sequence, run.last_sequence) == (
                    sequences[run.pod_ref][0],
                    sequences[run.pod_ref][-1],
                )
                found.setdefault((partition, run.pod_ref), []).extend(rows[: run.updates])
                rows = rows[run.updates :]
            assert not rows
    assert found == expected


def test_an_incarnation_begins_a_run():
    """Sequences of two incarnations are never in one run."""
    effects = Effects(1)
    effects.of(1, epoch_of(1), 900).add([b"a" * 16], HOLDER)
    effects.of(1, epoch_of(2), 0).add([b"b" * 16], HOLDER)
    effects.of(1, epoch_of(2, 1), 1).add([b"c" * 16], HOLDER)
    (value,) = effects.encode()[0]
    runs = [(run.epoch, run.first_sequence, run.last_sequence, run.updates) for run in decode_blocks(value).runs]
    assert runs == [(epoch_of(1), 900, 900, 1), (epoch_of(2, 1), 0, 1, 2)]


def test_a_long_run_goes_on_in_more_records(monkeypatch: pytest.MonkeyPatch):
    """What does not fit one record is applied as a whole, also when the records are repeated."""
    monkeypatch.setattr(module, "RECORD_UPDATES", 4)
    effects = Effects(1)
    keys = [bytes([number]) * 16 for number in range(11)]
    effects.of(1, epoch_of(1), 3).add(keys, b"\x00" * 7 + b"\x01" + HOLDER[8:])
    effects.of(2, epoch_of(1), 0).add(keys[:2], b"\x00" * 7 + b"\x02" + HOLDER[8:])
    values = effects.encode()[0]
    assert [len(_rows(value)) for value in values] == [4, 4, 4, 1]
    view, counts = DictView(), Counter()
    for value in [*values, *values]:
        apply_blocks(view, decode_blocks(value), counts)
    assert set(keys) <= view.values.keys()
    assert [len(view.values[key]) for key in keys] == [48] * 2 + [24] * 9


def test_nothing_to_write_is_nothing():
    """Effects without changes are false and make no records."""
    effects = Effects(3)
    assert not effects
    effects.of(1, 1, 1)
    assert effects.encode() == {}


def test_a_pods_record_is_built_as_of_its_last_message():
    """Only the last word on a pod is asked for."""
    effects = Effects(1)
    effects.changed("p", lambda: PodRecord(pod="p", writer="streams", epoch=1))
    effects.changed("p", lambda: PodRecord(pod="p", writer="streams", epoch=2))
    assert effects
    assert {pod: record.epoch for pod, record in effects.pods.items()} == {"p": 2}
