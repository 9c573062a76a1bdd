"""``kvatlas worker``: one stream worker, or several of them under one supervisor."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli import common
from kvatlas.deploy.cli.entry import EXIT_USAGE
from kvatlas.deploy.reindex.catalog import configured
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.streams.faust_app.app import group_of
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService

HELP: Final = "materialise the block index and answer lookups"

_CHILD: Final = "--child"
_STOP_SECONDS: Final = 8.0
_RESTART_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.1


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
    parser.add_argument(_CHILD, type=int, default=-1, help=argparse.SUPPRESS)


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
    if settings.processes > 1 and args.child < 0:
        return Supervisor(settings.processes, _arguments()).run()
    if args.child >= 0:
        settings = child_settings(settings, args.child)
        sections["scorer"] = child_scorer(sections["scorer"], args.child)
        sections["picker"] = child_picker(sections["picker"], args.child)
    _use_uvloop()
    return asyncio.run(
        _serve(settings, sections["kafka"], sections if args.with_scorer else None, picks=args.with_picker)
    )


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
    return f"{host}:{int(port) + number}" if host and port.isdigit() and int(port) else address


def topics_of(settings: WorkerSettings) -> tuple[topics.Topic, ...]:
    """Return the topics that a worker makes where they are missing; `kvatlas reindex` makes those of new versions."""
    if settings.index_version == topics.BASE_VERSION:
        return (*topics.TOPICS, *topics.changelog_topics(settings.app))
    return tuple(topic for topic in topics.TOPICS if topic.name != topics.BLOCKS)


async def _serve(settings: WorkerSettings, kafka: KafkaSettings, scorer: dict[str, Any] | None, *, picks: bool) -> int:
    version, groups = settings.index_version, [group_of(settings)]
    rights = rights_of("worker", kafka, app=settings.app, version=version, groups=groups)
    if scorer is not None:
        rights += rights_of("scorer", kafka)
    stop = common.async_stop_event()
    if not await common.unless_stopped(stop, check_rights(kafka, rights, wait_seconds=START_SECONDS)):
        return 0
    if kafka.create_topics:
        await ensure_topics(kafka, topics_of(settings))
    settings = await configured(kafka, settings)
    service = _service(settings, kafka, scorer, picks=picks)
    with common.leaving("worker"):  # Faust's tasks and threads outlive a stop while the brokers are away
        try:
            await service.start()
            announcing = asyncio.create_task(_say_ready(service))
            await service.run_until(stop)
            announcing.cancel()
        finally:
            await service.stop()
    return 0


def _service(settings: WorkerSettings, kafka: KafkaSettings, scorer: dict[str, Any] | None, *, picks: bool) -> Any:
    """Return the worker, with its scorer where one is asked for, and the picker around both."""
    if scorer is None:
        return WorkerService(settings, kafka)
    from kvatlas.deploy.processes.colocated import ScoringWorker  # noqa: PLC0415 - a worker alone needs no tokenizers

    worker = ScoringWorker(settings, kafka, scorer["scorer"], scorer["tokenizer"])
    if not picks:
        return worker
    from kvatlas.deploy.processes.picking import WorkerWithPicker  # noqa: PLC0415 - only when it runs

    return WorkerWithPicker(scorer["picker"], worker)


async def _say_ready(service: Any) -> None:
    await service.ready.wait()
    tune_interpreter()
    more = [(name, getattr(service, f"{name}_address", "")) for name in ("scorer", "picker")]
    print(f"ready worker={service.address}" + "".join(f" {name}={where}" for name, where in more if where), flush=True)


def _use_uvloop() -> None:
    try:
        import uvloop  # noqa: PLC0415 # not on every platform
    except ImportError:
        return
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _arguments() -> list[str]:
    return [sys.executable, "-m", "kvatlas.deploy", *sys.argv[1:]]


class Supervisor:
    """Runs worker processes: starts them anew when they die, hands signals on, waits for all of them.

    Args:
        processes: how many.
        command: what runs one; ``--child N`` is added.
    """

    def __init__(self, processes: int, command: Sequence[str]) -> None:
        self._command = list(command)
        self._children: list[subprocess.Popen[Any] | None] = [None] * processes
        self._started = [0.0] * processes
        self._stopping = False

    def run(self) -> int:
        """Run until SIGTERM or Ctrl-C, or until a child finds its settings or rights wrong.

        Returns:
            0 when all children ended cleanly, 2 after wrong settings or rights, else 1.
        """
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self._stop())
        for number in range(len(self._children)):
            self._start(number)
        while not self._stopping:
            time.sleep(_POLL_SECONDS)
            self._revive()
        return self._wait()

    def _start(self, number: int) -> None:
        self._started[number] = time.monotonic()
        # A session of its own: Ctrl-C reaches the supervisor alone, which hands it on once.
        self._children[number] = subprocess.Popen(  # noqa: S603 # our own command line
            [*self._command, _CHILD, str(number)], start_new_session=True
        )

    def _revive(self) -> None:
        for number, child in enumerate(self._children):
            if child is None or child.poll() is None or self._stopping:
                continue
            if child.returncode == EXIT_USAGE:  # it said what is wrong, and would say so for ever
                self._stop()
            elif time.monotonic() - self._started[number] >= _RESTART_SECONDS:
                print(
                    f"worker process {number} ended with {child.returncode}, started anew", file=sys.stderr, flush=True
                )
                self._start(number)

    def _stop(self) -> None:
        self._stopping = True
        for child in self._children:
            if child is not None and child.poll() is None:
                child.terminate()

    def _wait(self) -> int:
        deadline = time.monotonic() + _STOP_SECONDS
        codes = []
        for child in self._children:
            if child is None:
                continue
            try:
                codes.append(child.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                codes.append(child.wait())
        if EXIT_USAGE in codes:
            return EXIT_USAGE
        return 0 if all(code == 0 for code in codes) else 1
