"""Settings: precedence of their sources, types, and errors that name the source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime import settings
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings, Section
from kvatlas.scorer.options import ScorerSettings
from kvatlas.streams.options import WorkerSettings


class Example(Section, frozen=True, kw_only=True):
    """One setting of each kind."""

    CONSTANTS = frozenset({"depth"})

    name: Annotated[str, Meta(description="who")]
    count: Annotated[int, Meta(description="how many", ge=0, le=100)] = 1
    share: Annotated[float, Meta(description="100% is 1", ge=0, le=1)] = 0.5
    on: Annotated[bool, Meta(description="switch")] = False
    colour: Annotated[Literal["red", "green"], Meta(description="which")] = "red"
    parts: Annotated[list[str], Meta(description="several")] = []  # noqa: RUF012 - msgspec copies it

    def __post_init__(self) -> None:
        """Compare two settings."""
        if self.on and not self.count:
            raise ValueError("on needs a count")


def flags(*words: str, prefix: str = "") -> dict[str, Any]:
    """Parse a command line as the subcommands do."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    settings.add_flags(parser, "example", Example, prefix)
    return settings.flags_of(parser.parse_args(words), "example")


def load(
    *words: str, environ: dict[str, str] | None = None, document: dict[str, dict[str, Any]] | None = None
) -> Example:
    """Load the example from all sources."""
    return settings.load("example", Example, flags=flags(*words), environ=environ, document=document)


@given(st.sets(st.sampled_from(["flag", "env", "file"])))
def test_each_setting_takes_the_highest_source_that_gives_it(sources: set[str]) -> None:
    """A flag beats the environment, which beats the file, which beats the default, in every combination."""
    found = load(
        "--name=x",
        *(["--count=4"] if "flag" in sources else []),
        environ={"KVATLAS_EXAMPLE_COUNT": "3"} if "env" in sources else {},
        document={"example": {"count": 2}} if "file" in sources else {},
    )
    best = next((value for name, value in (("flag", 4), ("env", 3), ("file", 2)) if name in sources), 1)
    assert found.count == best


def test_a_higher_source_can_give_the_default_back() -> None:
    """A flag or variable with the default's value still wins over the file."""
    document = {"example": {"name": "x", "count": 9, "on": True, "colour": "green"}}
    found = load("--count=1", "--no-on", environ={"KVATLAS_EXAMPLE_COLOUR": "red"}, document=document)
    assert (found.count, found.on, found.colour) == (1, False, "red")


def test_sources_mix_setting_by_setting() -> None:
    """One source does not hide what another says of other settings."""
    found = load("--share=0.25", environ={"KVATLAS_EXAMPLE_NAME": "env"}, document={"example": {"count": 7}})
    assert (found.name, found.count, found.share) == ("env", 7, 0.25)


def test_lists_come_from_every_source() -> None:
    """Repeated flags, semicolons in the environment, arrays in the file; a higher source replaces the whole list."""
    document = {"example": {"name": "x", "parts": ["f1", "f2"]}}
    environ = {"KVATLAS_EXAMPLE_PARTS": " e1 ; e2;;"}
    assert load(document=document).parts == ["f1", "f2"]
    assert load(document=document, environ=environ).parts == ["e1", "e2"]
    assert load("--parts=a,b", "--parts", "c", document=document, environ=environ).parts == ["a,b", "c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("Yes", True), ("on", True), ("false", False), ("0", False), ("no", False)],
)
def test_switches_read_the_usual_words(text: str, value: bool) -> None:
    """A bool in the environment is one of the usual words, in any case."""
    document = {"example": {"name": "x", "on": not value}}
    assert load(environ={"KVATLAS_EXAMPLE_ON": text}, document=document).on is value


@pytest.mark.parametrize(
    ("words", "environ", "document", "named"),
    [
        ((), {"KVATLAS_EXAMPLE_COUNTS": "1"}, {}, "KVATLAS_EXAMPLE_COUNTS.*known: .*count"),
        ((), {}, {"example": {"kount": 1}}, r"\[example\] kount in the settings file"),
        ((), {"KVATLAS_EXAMPLE_COUNT": "many"}, {}, "KVATLAS_EXAMPLE_COUNT: 'many'"),
        ((), {"KVATLAS_EXAMPLE_COUNT": "101"}, {}, "KVATLAS_EXAMPLE_COUNT.*<= 100"),
        ((), {"KVATLAS_EXAMPLE_ON": "perhaps"}, {}, "KVATLAS_EXAMPLE_ON"),
        ((), {}, {"example": {"share": 1.5}}, r"\[example\] share.*<= 1"),
        ((), {}, {"example": {"name": 5}}, r"\[example\] name.*5 is not text"),
        ((), {}, {"example": {"colour": "blue"}}, r"\[example\] colour.*blue"),
        ((), {}, {"example": {"parts": [1]}}, r"\[example\] parts"),
        (("--count=-1",), {}, {}, "flag --count.*>= 0"),
        (("--share=much",), {}, {}, "flag --share: 'much'"),
        (("--on", "--count=0"), {}, {}, r"\[example\]: on needs a count"),
    ],
)
def test_a_bad_value_names_its_source(
    words: tuple[str, ...], environ: dict[str, str], document: dict[str, dict[str, Any]], named: str
) -> None:
    """The error says which source, which key and what is wrong."""
    with pytest.raises(SettingsError, match=named):
        load("--name=x", *words, environ=environ, document=document)


def test_a_bad_value_of_a_file_names_the_file() -> None:
    """Whatever its name: braces in it are no places of ours."""
    with pytest.raises(SettingsError, match=r"\[example\] kount in the settings file /etc/\{a\}\.toml; known"):
        settings.load("example", Example, document={"example": {"kount": 1}}, file="/etc/{a}.toml")


def test_a_bad_value_counts_even_where_a_higher_source_overrides_it() -> None:
    """What is overridden is checked all the same, so that it does not surface on another day."""
    with pytest.raises(SettingsError, match="KVATLAS_EXAMPLE_COUNT"):
        load("--name=x", "--count=5", environ={"KVATLAS_EXAMPLE_COUNT": "many"})


def test_a_missing_setting_says_how_to_give_it() -> None:
    """A setting without a default is asked for by flag, variable and file key."""
    with pytest.raises(SettingsError, match=r"--name, KVATLAS_EXAMPLE_NAME or \[example\] name"):
        load()


def test_other_sections_variables_are_left_alone() -> None:
    """Only names of the section are read; a longer section name is no part of it."""
    environ = {"KVATLAS_OTHER_COUNT": "x", "KVATLAS_EXAMPLES_COUNT": "x", "EXAMPLE_COUNT": "x"}
    assert load("--name=x", environ=environ).count == 1


def test_flags_with_a_prefix_fill_the_same_settings() -> None:
    """The prefix is part of the flag, not of the setting."""
    assert flags("--example-count=3", "--example-name=x", prefix="example_") == {"count": "3", "name": "x"}


def test_flags_that_are_not_given_leave_no_trace() -> None:
    """An absent flag must not hide the other sources behind its default."""
    assert flags() == {}


def test_help_shows_default_variable_and_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a flag has its text, its default and its variable."""
    with pytest.raises(SystemExit):
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "100% is 1 (default 0.5) [KVATLAS_EXAMPLE_SHARE]" in text
    assert "--parts VALUE several [KVATLAS_EXAMPLE_PARTS], repeatable" in text


def test_what_is_a_constant_now_is_told_wherever_it_is_set() -> None:
    """A name that was a setting is an error of its own kind in a flag, the environment and the file."""
    for sources in ({"environ": {"KVATLAS_EXAMPLE_DEPTH": "3"}}, {"document": {"example": {"depth": 3}}}):
        with pytest.raises(SettingsError, match=r"depth.* is a constant now|DEPTH is a constant now"):
            load("--name=x", **sources)
    for words in (("--depth", "3"), ("--depth=3",), ("--depth",)):
        with pytest.raises(SettingsError, match="flag --depth is a constant now"):
            load("--name=x", *words)


def test_a_settings_file_must_be_readable_toml_of_known_sections(tmp_path: Path) -> None:
    """Each way to go wrong names the file."""
    file = tmp_path / "kvatlas.toml"
    for text, named in (
        ("[example\n", "not TOML"),
        ("[exampel]\n", r"unknown section \[exampel\]; known: example"),
        ("example = 1\n", "'example' must be a section"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=named) as caught:
            settings.read_file(file, ["example"])
        assert str(file) in str(caught.value)
    with pytest.raises(SettingsError, match=r"absent\.toml: No such file"):
        settings.read_file(tmp_path / "absent.toml", ["example"])


@pytest.mark.parametrize("section", [KafkaSettings, LogSettings, BridgeSettings, WorkerSettings, ScorerSettings])
def test_each_setting_of_ours_is_explained_and_loads_from_its_own_words(section: type[Section]) -> None:
    """Every field has a help text, and its default written to the environment gives the same settings."""
    fields = settings.fields_of(section)
    assert [field.name for field in fields if not field.help] == []
    environ = {settings.env_name("any", field.name): settings._shown(field.default) for field in fields}
    assert settings.load("any", section, environ=environ) == section()


def test_settings_are_frozen() -> None:
    """What was loaded cannot change under a running service."""
    with pytest.raises(AttributeError):
        load("--name=x").count = 5  # type: ignore[misc]


def test_a_topic_prefix_goes_before_every_topic() -> None:
    """Deployments share a cluster by prefix."""
    assert KafkaSettings(topic_prefix="eu-").topic("kv-events") == "eu-kv-events"
    assert KafkaSettings().topic("kv-events") == "kv-events"
