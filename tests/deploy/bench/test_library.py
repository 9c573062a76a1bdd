"""``kvatlas bench library`` gives figures in the common form, and checks the answers that it times."""

from __future__ import annotations

import argparse

import pytest

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.bench import library


def _figures(*flags: str) -> dict[str, dict[str, object]]:
    parser = argparse.ArgumentParser()
    library.add_arguments(parser)
    return {str(figure["case"]): figure for figure in library.run(parser.parse_args(flags))}


def test_figures() -> None:
    """Every case gives a positive figure with its unit; a Redis score stands beside its plain multi-get."""
    figures = _figures("--rounds=5", "--tokens=2048", "--pods=3", "--blocks=3200")
    assert {case: figure["unit"] for case, figure in figures.items()} == {
        "memory-add": "us/key",
        "memory-lookup": "us/key",
        "memory-score-8192": "ms",
        "redis-score-8192": "ms",
        "events": "blocks/s",
        "mirror": "entries/s",
    }
    assert all(float(str(figure["value"])) > 0 for figure in figures.values())
    assert {"baseline", "ratio"} <= set(figures["redis-score-8192"])


def test_a_redis_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server on the path the case says what to install."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(KvatlasError, match="redis-server"):
        _figures("--case=redis-score-8192")
