"""Recorded streams of a real engine: the fold must know what the engine itself answered."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

from kvatlas.bridge.model.events import Tier

CAPTURES = Path(__file__).parents[2] / "data" / "captures"


def _frames(name):
    """Yield (sequence, payload) of a recording: a msgpack stream of ``[topic, sequence, payload]`` as raw bytes."""
    data = gzip.decompress((CAPTURES / f"{name}.frames.gz").read_bytes())
    at = 0
    while at < len(data):
        assert data[at] == 0x93
        at += 1
        fields = []
        for _ in range(3):
            width = {0xC4: 1, 0xC5: 2, 0xC6: 4}[data[at]]
            size = int.from_bytes(data[at + 1 : at + 1 + width], "big")
            start = at + 1 + width
            fields.append(data[start : start + size])
            at = start + size
        yield int.from_bytes(fields[1], "big"), fields[2]


def _play(w, name, per_flush):
    for number, (sequence, payload) in enumerate(_frames(name), 1):
        w.raw(name, payload, sequence=sequence, deliver=False, model="demo-model")
        if number % per_flush == 0:
            w.deliver(w.log[-per_flush:])
    rest = len(w.log) % per_flush
    w.deliver(w.log[-rest:] if rest else [])


def test_offload_events_put_blocks_on_their_tiers(world):
    """Placeholders and self-describing offload events agree on what lies where, and nothing waits at the end."""
    found = []
    for name in ("offload-selfdesc0", "offload-selfdesc1"):
        w = world()
        _play(w, name, 5)
        assert not w.dead
        assert w.state(name).orphans == 0
        keys = [key for view in w.index for key in view.values if len(key) == 16]
        found.append(Counter((holder.tier, holder.group) for key in keys for holder in w.holders(key)))
    # What the recordings announce less what they remove; the built-in file tier never announces a removal.
    assert found[0] == found[1] == {(Tier.GPU, 0): 10, (Tier.CPU, 0): 10, (Tier.DISK, 0): 12}
