"""A machine's spin figure, alone and beside the figures of a benchmark."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from kvatlas.deploy.bench import calibrate
from kvatlas.deploy.commands import bench


def test_one_core_and_all_of_them() -> None:
    """All cores together do at least a part of what one does; both figures say how much was done a second."""
    one, together = calibrate.run(Namespace(rounds=1))
    assert (one["case"], one["unit"]) == ("spin", "million steps/s")
    assert one["value"] > 0
    assert together["baseline"] == one["value"]
    assert together["ratio"] == round(together["value"] / one["value"], 2)


def test_every_figure_has_the_spin_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that a benchmark printed can be compared with another machine's."""
    assert bench.run(Namespace(name="resolve", rest=["--json", "--messages", "20", "--repeat", "1"])) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert figures
    assert all(figure["spin"] > 0 and figure["bench"] == "resolve" for figure in figures)
