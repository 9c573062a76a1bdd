"""The configuration reference is what the settings classes say."""

from pathlib import Path

import pytest

from kvatlas.bridge.runtime.settings import fields_of
from kvatlas.deploy.cli import common
from kvatlas.deploy.cli.entry import main

MOST_SETTINGS = 160

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]):
    """`kvatlas config --markdown` prints docs/configuration.md; after a change of a setting write it anew."""
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()


def test_there_are_few_settings_and_none_is_a_constant_too():
    """A setting is there because somebody has a reason to turn it; the others are constants, and known as such."""
    classes = [common.section_class(name) for name in common.SECTIONS]
    names = [{field.name for field in fields_of(section)} for section in classes]
    assert sum(map(len, names)) <= MOST_SETTINGS
    assert not any(getattr(section, "CONSTANTS", set()) & known for section, known in zip(classes, names, strict=True))
