"""Tests of ``kvatlas worker`` apart from the worker itself."""

from __future__ import annotations

import argparse

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.commands.worker import add_arguments, child_settings, run, shifted
from kvatlas.streams.options import WorkerSettings


@pytest.mark.parametrize(
    ("address", "number", "wanted"),
    [("127.0.0.1:0", 3, "127.0.0.1:0"), ("0.0.0.0:7000", 2, "0.0.0.0:7002"), ("", 1, ""), ("host", 1, "host")],
)
def test_fixed_ports_are_counted_up(address: str, number: int, wanted: str) -> None:
    """Each process listens on its own port; free ports stay free ports."""
    assert shifted(address, number) == wanted


def test_each_process_has_its_own_folder() -> None:
    """Two processes never share tables."""
    settings = WorkerSettings(state_dir="/s", processes=2, listen="h:7000", telemetry_listen="h:9000")
    child = child_settings(settings, 1)
    assert (child.state_dir, child.listen, child.telemetry_listen, child.processes) == ("/s/w1", "h:7001", "h:9001", 1)


def test_without_a_supervisor_there_is_one_process() -> None:
    """Several processes without anybody to watch them are refused."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SettingsError, match="--no-supervise"):
        run(parser.parse_args(["--no-supervise", "--processes=2"]))
