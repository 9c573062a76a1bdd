"""Tests of the worker with a scorer: what can be told without a broker."""

from __future__ import annotations

import argparse

import pytest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli import common
from kvatlas.deploy.commands import worker
from kvatlas.deploy.processes.colocated import ScoringWorker
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings


def parsed(*words: str) -> tuple[argparse.Namespace, dict[str, object]]:
    parser = argparse.ArgumentParser()
    worker.add_arguments(parser)
    args = parser.parse_args(words)
    return args, common.load_sections(args, environ={})


def test_the_scorer_s_flags_carry_its_name() -> None:
    """``--listen`` is the worker's and ``--scorer-listen`` the scorer's; without ``--with-scorer`` there is none."""
    args, sections = parsed("--listen=127.0.0.1:7", "--scorer-listen=127.0.0.1:8", "--with-scorer")
    assert args.with_scorer
    assert sections["worker"].listen == "127.0.0.1:7"  # type: ignore[attr-defined]
    assert sections["scorer"].listen == "127.0.0.1:8"  # type: ignore[attr-defined]
    assert not parsed()[0].with_scorer


def test_each_of_several_processes_has_its_own_scorer() -> None:
    """Ports count up from the settings', sockets and names get the process's number, free ports stay free."""
    settings = ScorerSettings(
        listen="0.0.0.0:50051", http_listen="127.0.0.1:8080", telemetry_listen="127.0.0.1:0", socket="/run/s", name="s"
    )
    third = worker.child_scorer(settings, 2)
    assert (third.listen, third.http_listen, third.telemetry_listen) == (
        "0.0.0.0:50053",
        "127.0.0.1:8082",
        "127.0.0.1:0",
    )
    assert (third.socket, third.name) == ("/run/s.2", "s-2")
    assert worker.child_scorer(ScorerSettings(), 1).socket == ""


def test_a_worker_without_an_index_takes_no_scorer() -> None:
    """The role ``resolve`` keeps no index, so a scorer beside it is refused with the reason."""
    with pytest.raises(SettingsError, match="role resolve keeps no index"):
        ScoringWorker(WorkerSettings(role="resolve"), KafkaSettings(), ScorerSettings(), TokenizerSettings())
