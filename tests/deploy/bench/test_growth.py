"""The growth benchmark on a small index: every figure is there, and what was stored is found again."""

from __future__ import annotations

from argparse import Namespace

from kvatlas.deploy.bench import growth


def test_a_small_index_gives_every_figure() -> None:
    """The benchmark itself fails when a lookup does not find a block that was stored."""
    figures = list(growth.run(Namespace(entries=20_000, pods=5, active=2, partitions=2)))
    assert [figure["unit"] for figure in figures] == [
        "updates/CPU s",
        "ms",
        "entries/CPU s",
        "bytes an entry",
        "bytes an entry",
    ]
    assert all(figure["value"] > 0 for figure in figures)
    assert {figure["case"].split(":")[0] for figure in figures} == {"20,000 entries, 5 pods, 2 active"}
