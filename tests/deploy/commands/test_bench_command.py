"""`kvatlas bench`: what it lists, and what it says where a benchmark's packages are missing."""

from __future__ import annotations

import sys

import pytest

from kvatlas.deploy.cli import entry
from kvatlas.deploy.commands.bench import names


def test_the_list_explains_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Every benchmark has a line of its own that says what it measures."""
    assert entry.main(["bench", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert all(len(line.split()) > 4 for line in lines)


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that cannot be imported says what to install, and does not hide the others."""
    for module in [module for module in sys.modules if module.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, module)
    for module in [module for module in sys.modules if module == "kvatlas.deploy.bench.library"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    assert entry.main(["bench", "library", "--json"]) == 2
    told = capsys.readouterr().err
    assert "needs the package redis" in told
    assert "pip install" in told
    assert entry.main(["bench", "list"]) == 0
    assert "recovery" in capsys.readouterr().out
