"""``kvatlas worker``: one stream worker, or several of them, under a supervisor that starts each again when it dies."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import port_of
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main
from kvatlas.deploy.processes.child import document
from kvatlas.deploy.processes.supervisor import Child, supervise
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.streams.options import WorkerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(
        parser, "kafka", "worker", "log", "scorer", "picker", "tokenizer", prefixed=("scorer", "picker")
    )
    parser.add_argument(
        "--with-scorer", action="store_true", help="also serve scores, read from this worker's tables without a hop"
    )
    parser.add_argument(
        "--with-picker", action="store_true", help="also pick pods for a gateway, with the scorer of --with-scorer"
    )
    parser.add_argument(
        "--no-supervise",
        action="store_true",
        help="run the worker in this process and end with it, for who restarts it himself, as Kubernetes does",
    )


def run(args: argparse.Namespace) -> int:
    """Run a worker until SIGTERM or Ctrl-C.

    Prints ``ready worker=HOST:PORT`` once its partitions are restored; with a scorer, `` scorer=HOST:PORT`` follows and
    scores can be asked for too.
    """
    sections = common.load_sections(args)
    settings: WorkerSettings = sections["worker"]
    if args.with_picker and not args.with_scorer:
        raise SettingsError("--with-picker needs --with-scorer, whose answers it picks by")
    configure_logging(sections["log"], "worker")
    part = "picking-worker" if args.with_picker else "scoring-worker" if args.with_scorer else "worker"
    if args.no_supervise:
        if settings.processes > 1:
            raise SettingsError("--no-supervise: one process alone; leave out --processes, or supervise them")
        return main.run(part, sections)
    starts = [_starts(part, sections)]
    if settings.processes > 1:
        starts = [_starts(part, _numbered(sections, number)) for number in range(settings.processes)]
    return supervise("worker", starts, common.stop_event(), lambda said: print(f"ready {said}", flush=True))


def _starts(part: str, sections: dict[str, Any]) -> Callable[[Restarts], Child]:
    return lambda restarts: Child(part, document(part, sections, restarts=restarts), None)


def _numbered(sections: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the settings of one of several processes."""
    return {
        **sections,
        "worker": child_settings(sections["worker"], number),
        "scorer": child_scorer(sections["scorer"], number),
        "picker": child_picker(sections["picker"], number),
    }


def child_settings(settings: WorkerSettings, number: int) -> WorkerSettings:
    """Return the settings of one of several worker processes: its own folder and its own ports."""
    return msgspec.structs.replace(
        settings,
        processes=1,
        state_dir=str(Path(settings.state_dir) / f"w{number}"),
        listen=shifted(settings.listen, number),
        telemetry_listen=shifted(settings.telemetry_listen, number),
        advertise=shifted(settings.advertise, number),
    )


def child_scorer(settings: ScorerSettings, number: int) -> ScorerSettings:
    """Return the settings of the scorer in one of several worker processes: its own name, socket and ports."""
    return msgspec.structs.replace(
        settings,
        name=f"{settings.name}-{number}" if settings.name else "",
        listen=shifted(settings.listen, number),
        socket=f"{settings.socket}.{number}" if settings.socket else "",
        http_listen=shifted(settings.http_listen, number),
        telemetry_listen=shifted(settings.telemetry_listen, number),
    )


def child_picker(settings: PickerSettings, number: int) -> PickerSettings:
    """Return the settings of the picker in one of several worker processes: its own name and ports."""
    return msgspec.structs.replace(
        settings,
        name=f"{settings.name}-{number}" if settings.name else "",
        listen=shifted(settings.listen, number),
        telemetry_listen=shifted(settings.telemetry_listen, number),
    )


def shifted(address: str, number: int) -> str:
    """Return ``host:port`` with ``number`` added to a fixed port; port 0, or none, stays."""
    host, _, port = address.rpartition(":")
    return f"{host}:{first + number}" if host and (first := port_of(port)) else address
