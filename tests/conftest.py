"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, to be made or to run, says more of what else the machine does than of the code.
QUIET = [HealthCheck.too_slow]
settings.register_profile("kvatlas", deadline=None, suppress_health_check=QUIET, derandomize=True)
# `--hypothesis-profile explore` looks at other examples with every run; the plain run looks at the same ones.
settings.register_profile("explore", deadline=None, suppress_health_check=QUIET)
settings.load_profile("kvatlas")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not torch"` leave modules alone that need torch, with `-m torch` all others: torch may not be there.

    A test of tests/test_markers.py guards that a module which needs torch says so for all of its tests.
    """
    expression = config.option.markexpr
    if "torch" not in expression or not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    needs = "pytest.mark.torch" in collection_path.read_text(encoding="utf-8")
    return True if needs == ("not torch" in expression) else None
