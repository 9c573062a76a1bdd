"""Bounds of the memory backend."""

from kvatlas.scorer.library.backends import MemoryBackend
from kvatlas.scorer.library.backends.sketch import FrequencySketch
from kvatlas.streams.index.blocks_record import OP_ADD

from .test_conformance import holder, key, record


async def test_entries_are_bounded_and_the_least_recent_goes():
    """Asking for a block keeps it; the bound holds after every record."""
    backend = MemoryBackend(max_entries=10)
    await backend.apply(record(1, 0, [(OP_ADD, key(n), holder(1)) for n in range(10)]))
    await backend.lookup([key(0)])
    await backend.apply(record(1, 1, [(OP_ADD, key(n), holder(1)) for n in range(10, 19)]))
    found = await backend.lookup([key(n) for n in range(19)])
    assert [n for n, value in enumerate(found) if value] == [0, *range(10, 19)]
    assert (await backend.stats()).evicted == 9


async def test_bytes_are_bounded():
    """However much comes, the accounted memory stays under the bound."""
    backend = MemoryBackend(None, max_bytes=100_000)
    for sequence in range(20):
        updates = [(OP_ADD, key(sequence * 100 + n), holder(1)) for n in range(100)]
        await backend.apply(record(1, sequence, updates))
        assert (await backend.stats()).bytes <= 100_000


async def test_a_scan_does_not_flush_what_is_asked_for():
    """Blocks that are looked up stay when many blocks pass by that nobody asks for."""
    backend = MemoryBackend(None, max_bytes=100_000)
    shared = [key(n) for n in range(100)]
    await backend.apply(record(1, 0, [(OP_ADD, one, holder(1)) for one in shared]))
    for _ in range(5):
        await backend.lookup(shared)
    await backend.apply(record(1, 1, [(OP_ADD, key(1000 + n), holder(1)) for n in range(5000)]))
    assert all(await backend.lookup(shared))
    stats = await backend.stats()
    assert stats.refused > 0
    assert stats.bytes <= 100_000


def test_the_sketch_never_counts_too_little_and_forgets_with_time():
    """Between halvings an estimate is at least the true count; after many other keys it fades."""
    sketch = FrequencySketch(width_bits=10)
    for _ in range(20):
        sketch.add_all([key(1)])
    assert sketch.estimate(key(1)) >= 20
    for n in range(5):
        sketch.add_all([key(100 + n * 1000 + m) for m in range(1000)])
    assert sketch.estimate(key(1)) < 20
