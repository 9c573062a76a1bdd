"""Markers choose where a test runs: none may fall between the commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.integration.conftest import ONE_PROCESS

TESTS = Path(__file__).parent
MODULES = sorted(path for path in TESTS.rglob("test_*.py") if path != Path(__file__))


def _imports_torch(tree: ast.Module) -> bool:
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    return any(name.partition(".")[0] == "torch" for name in names)


def _marks(tree: ast.Module) -> str:
    """The module's own marks, as source."""
    return "".join(
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_module_that_needs_torch_is_marked_as_a_whole(path: Path) -> None:
    """Modules with torch run in its environment alone; a mark on a single test would lose the module's others."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ("mark.torch" in _marks(tree)) == ("pytest.mark.torch" in text), "mark the module: pytestmark = ..."
    assert not _imports_torch(tree) or "mark.torch" in _marks(tree)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_is_skipped_or_allowed_to_fail(path: Path) -> None:
    """What cannot be tested on a machine is not told as tested."""
    called = {
        ast.unparse(node).removeprefix("pytest.").removeprefix("mark.")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")
    }
    assert not called & {"skip", "skipif", "xfail", "importorskip", "flaky"}


def test_the_list_of_promises_names_every_test_on_the_real_kafka_and_nothing_else() -> None:
    """docs/testing.md names files that are there, and each file of tests/integration and tests/soak."""
    page = (TESTS.parent / "docs" / "testing.md").read_text(encoding="utf-8").partition("## Promises")[2]
    names = re.findall(r"`([\w/]*test_\w+\.py)`", page)
    named = {name.removeprefix("tests/") if "/" in name else f"integration/{name}" for name in names}
    there = {str(path.relative_to(TESTS)) for path in MODULES}
    assert named - there == set()
    assert {name for name in there - named if name.startswith(("integration/", "soak/"))} == set()


@pytest.mark.parametrize("path", sorted((TESTS / "integration").glob("test_*.py")), ids=lambda path: path.name)
def test_a_module_whose_tests_share_a_fixture_stays_in_one_process(path: Path) -> None:
    """In a parallel run each process would make what is shared anew: a node, a pipeline."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    shared = any("scope='module'" in ast.unparse(mark) for node in made for mark in node.decorator_list)
    assert shared == (path.name in ONE_PROCESS)
