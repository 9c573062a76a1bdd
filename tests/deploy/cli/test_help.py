"""`--help` of every command, and what a wrong flag says."""

from __future__ import annotations

import shlex

import pytest

from kvatlas.deploy.cli.entry import available, main, parse
from kvatlas.deploy.cli.help import EXAMPLES


@pytest.mark.parametrize("name", available())
def test_help_of_each_command_fits_and_has_examples(name, capsys):
    """The usage line is short enough to be read, and calls to copy stand at the end."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert len(text.partition("\n\n")[0].splitlines()) <= 8, "usage is a wall of flags"
    assert all(example in text for example in EXAMPLES[name])


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_every_example_is_a_call_that_is_understood(example):
    """Its flags exist and take what is shown."""
    words = shlex.split(example)
    assert words[0] == "kvatlas"
    assert parse(words[1:]).command == words[1]


def test_who_starts_a_broker_learns_first_that_it_stays_in_the_foreground(capsys):
    """The first lines below the usage say so and name --detach: a script that waits for its end would hang."""
    with pytest.raises(SystemExit):
        main(["broker", "start", "--help"])
    first = " ".join(capsys.readouterr().out.split("\n\n")[1].splitlines()[:2])
    assert "stays in the foreground" in first
    assert "--detach" in first


def test_help_of_the_whole_names_first_steps_and_exit_codes(capsys):
    """Who runs `kvatlas --help` learns what to do first."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "first steps:" in text
    assert "Exit codes:" in text


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["bridge", "--broker", "x:1"], None),
        (["worker", "--state-dirr", "x"], "--state-dir"),
        (["top", "--onec"], "--once"),
    ],
)
def test_a_misspelt_flag_names_the_one_that_was_meant(words, meant, capsys):
    """Exit code 2 with one short line of usage, not all flags; an abbreviation is taken as the flag."""
    if meant is None:
        assert vars(parse(words))["kafka:brokers"] == "x:1"
        return
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert f"did you mean {meant}" in text
    assert len(text.splitlines()) <= 3


def test_an_unknown_command_lists_those_there_are(capsys):
    """The error names all commands."""
    with pytest.raises(SystemExit) as ended:
        main(["scoer"])
    assert ended.value.code == 2
    assert "scorer" in capsys.readouterr().err
