"""``kvatlas bench tokenize`` gives figures in the common form, and checks what it measures."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.bench import tokenize

TOKENIZER = Path(__file__).parents[2] / "data" / "tokenizer"


def _figures(*flags: str) -> dict[str, dict[str, object]]:
    parser = argparse.ArgumentParser()
    tokenize.add_arguments(parser)
    return {str(figure["case"]): figure for figure in tokenize.run(parser.parse_args(flags))}


def test_figures() -> None:
    """Every figure names its case and unit and stands beside its baseline; known text is faster than plain encoding."""
    figures = _figures("--tokenizer", str(TOKENIZER), "--tokens", "4096", "--rounds", "9")
    assert set(figures) == {"multiturn-4096", "threads-2-4096"}
    assert all({"value", "unit", "p50", "p99", "baseline", "ratio"} <= set(figure) for figure in figures.values())
    assert float(str(figures["multiturn-4096"]["ratio"])) > 1.5


def test_missing_tokenizer(tmp_path: Path) -> None:
    """A folder without a tokenizer is refused by name."""
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        _figures("--tokenizer", str(tmp_path))
