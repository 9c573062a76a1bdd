"""Settings from their sources, and the command line around them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.cli import common, entry


def load(*flags: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    common.add_sections(parser, "kafka", "log", "sim")
    return common.load_sections(parser.parse_args(flags), environ or {})


def test_flags_win_over_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    """Each source overrides the one below it, setting by setting."""
    file = tmp_path / "kvatlas.toml"
    file.write_text("[sim]\npods = 2\nblocks = 20\nseed = 200\n")
    environ = {"KVATLAS_CONFIG": str(file), "KVATLAS_SIM_BLOCKS": "30", "KVATLAS_SIM_PODS": "3"}
    sim = load("--pods", "4", environ=environ)["sim"]
    assert (sim.pods, sim.blocks, sim.seed, sim.sessions) == (4, 30, 200, 32)


@pytest.mark.parametrize(
    ("text", "flags", "environ", "named"),
    [
        ("[sim]\npodz = 1\n", (), {}, r"podz.*settings file"),
        ("[simm]\npods = 1\n", (), {}, r"unknown section \[simm\]"),
        ("[connector]\nx = 1\n", (), {}, r"unknown section \[connector\]"),
        ("", (), {"KVATLAS_CONNECTOR_X": "1"}, "KVATLAS_CONNECTOR_X"),
        ("[sim]\npods = 0\n", (), {}, r"pods.*settings file.*>= 1"),
        ("", (), {"KVATLAS_SIM_PODZ": "1"}, "KVATLAS_SIM_PODZ"),
        ("", (), {"KVATLAS_SIM_PODS": "many"}, "KVATLAS_SIM_PODS"),
        ("", (), {"KVATLAS_NOBODY_X": "1"}, "KVATLAS_NOBODY_X"),
        ("", ("--pods", "x"), {}, "--pods"),
        ("not toml", (), {}, "not TOML"),
    ],
)
def test_a_bad_source_is_named(
    tmp_path: Path, text: str, flags: tuple[str, ...], environ: dict[str, str], named: str
) -> None:
    """An unknown key or a bad value is an error that says where it came from."""
    file = tmp_path / "kvatlas.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=named):
        load("--config", str(file), *flags, environ=environ)


@pytest.mark.parametrize("command", ["sim", "up", "config", "topics", "bench", "version"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` explains the command and exits with 0."""
    with pytest.raises(SystemExit) as caught:
        entry.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: kvatlas {command}" in capsys.readouterr().out


def test_wrong_settings_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    """A settings error is one line on standard error and exit code 2."""
    assert entry.main(["sim", "--pods", "0"]) == 2
    assert "--pods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environ", "text", "expected"),
    [
        ((), {}, "", False),
        ((), {"KVATLAS_KAFKA_PARTITIONS": "4"}, "[kafka]\npartitions = 8\n", False),
        (("--brokers", "127.0.0.1:9092"), {}, "", True),
        ((), {"KVATLAS_KAFKA_BROKERS": "127.0.0.1:9092"}, "", True),
        ((), {}, '[kafka]\nbrokers = "127.0.0.1:9092"\n', True),
    ],
)
def test_a_given_setting_counts_even_with_the_default_s_value(
    tmp_path: Path, flags: tuple[str, ...], environ: dict[str, str], text: str, expected: bool
) -> None:
    """Brokers that any source gives are used, also where they are those that the default names."""
    file = tmp_path / "kvatlas.toml"
    file.write_text(text)
    parser = argparse.ArgumentParser()
    common.add_sections(parser, "kafka")
    args = parser.parse_args(("--config", str(file), *flags))
    assert common.is_given(args, "kafka", "brokers", environ) is expected
