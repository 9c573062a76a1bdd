"""The configuration reference is what the settings classes say."""

from pathlib import Path

import pytest

from kvatlas.deploy.cli.entry import main

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]):
    """`kvatlas config --markdown` prints docs/configuration.md; after a change of a setting write it anew."""
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()
