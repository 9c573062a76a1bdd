"""What the subcommands share: settings from their sources, and a clean stop on signals."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import math
import os
import signal
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.bridge.model.numbers import whole
from kvatlas.bridge.runtime import settings
from kvatlas.bridge.runtime.settings import ENV_FILE, ENV_PREFIX
from kvatlas.deploy.cli.entry import EXIT_USAGE

#: Section -> module and class of its settings; a class is imported only when its section is used.
SECTIONS: Final = {
    "kafka": ("kvatlas.bridge.runtime.settings", "KafkaSettings"),
    "log": ("kvatlas.bridge.runtime.settings", "LogSettings"),
    "bridge": ("kvatlas.bridge.options", "BridgeSettings"),
    "worker": ("kvatlas.streams.options", "WorkerSettings"),
    "scorer": ("kvatlas.scorer.options", "ScorerSettings"),
    "picker": ("kvatlas.scorer.gateway.options", "PickerSettings"),
    "tokenizer": ("kvatlas.scorer.tokenization.options", "TokenizerSettings"),
    "sim": ("kvatlas.deploy.sim.options", "SimSettings"),
    "console": ("kvatlas.deploy.console.options", "ConsoleSettings"),
}

#: Sections whose flags always carry a prefix, since their field names say too little alone.
_PREFIXES: Final = {"log": "log_", "tokenizer": "tokenizer_"}

#: Environment names that are no settings of a section.
_OTHER_NAMES: Final = frozenset({ENV_FILE, "KVATLAS_CACHE_DIR"})

_LAST_TOKEN: Final = 2**32 - 1


def section_class(name: str) -> type[msgspec.Struct]:
    """Return the settings class of a section."""
    module, attribute = SECTIONS[name]
    return cast("type[msgspec.Struct]", getattr(importlib.import_module(module), attribute))


def installed_sections() -> list[str]:
    """Return the sections whose package is installed, in order."""
    return [name for name, (module, _) in SECTIONS.items() if importlib.util.find_spec(module)]


def add_sections(parser: argparse.ArgumentParser, *names: str, prefixed: bool | Collection[str] = False) -> None:
    """Add ``--config`` and the flags of the sections.

    Args:
        parser: a subcommand's parser.
        names: sections, as in :data:`SECTIONS`.
        prefixed: put the section's name before its flags (``--bridge-...``), for commands that run several services:
            of the sections named, or of all, where ``kafka`` and ``log`` keep their names.
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file with one section per service [{ENV_FILE}]"
    )
    prefixes = {}
    for name in names:
        chosen = name in prefixed if isinstance(prefixed, Collection) else prefixed and name != "kafka"
        prefix = _PREFIXES.get(name, f"{name}_" if chosen else "")
        prefixes[name] = prefix
        settings.add_flags(parser, name, section_class(name), prefix)
    parser.set_defaults(sections=names)


def load_sections(
    args: argparse.Namespace,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build the sections that :func:`add_sections` named.

    Args:
        args: the parsed command line.
        environ: the environment; None for the process's own.
        defaults: section -> settings that this command prefers over the section's defaults; every source wins over
            them.

    Raises:
        SettingsError: a key is unknown or a value is bad; the text names the source and the key.
    """
    environ = os.environ if environ is None else environ
    document = read_document(args.config, environ)
    _check_environ(environ)
    merged = {
        name: {**dict((defaults or {}).get(name, {})), **document.get(name, {})}
        for name in {*document, *(defaults or {})}
    }
    file = str(args.config or environ.get(ENV_FILE, ""))
    return {
        name: settings.load(
            name, section_class(name), flags=settings.flags_of(args, name), environ=environ, document=merged, file=file
        )
        for name in args.sections
    }


def read_document(config: Path | None, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read the settings file that the flag or the environment names; nothing without one.

    Raises:
        SettingsError: it cannot be read, is not TOML or has an unknown section.
    """
    path = config or (Path(environ[ENV_FILE]) if environ.get(ENV_FILE) else None)
    return settings.read_file(path, tuple(SECTIONS)) if path else {}


def is_given(args: argparse.Namespace, section: str, field: str, environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether any source gives a setting, be it the default's value.

    Raises:
        SettingsError: the settings file cannot be read.
    """
    environ = os.environ if environ is None else environ
    return (
        field in settings.flags_of(args, section)
        or settings.env_name(section, field) in environ
        or field in read_document(args.config, environ).get(section, {})
    )


def _check_environ(environ: Mapping[str, str]) -> None:
    known = tuple(f"{ENV_PREFIX}{name}_".upper() for name in SECTIONS)
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in _OTHER_NAMES and not name.startswith(known):
            sections = ", ".join(sorted(SECTIONS))
            raise SettingsError(f"environment variable {name} is no setting of kvatlas; sections are {sections}")


def on_signals(stop: Callable[[], object]) -> None:
    """Call ``stop`` on SIGTERM and on Ctrl-C (main thread, outside an event loop)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop())


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set."""
    event = threading.Event()
    on_signals(event.set)
    return event


def async_stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and Ctrl-C set; call it inside the running loop."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Await ``work``, or cancel it once ``stop`` is set; returns whether it was done."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def at_least(least: float, kind: type[int] | type[float] = int, *, above: bool = False) -> Callable[[str], Any]:
    """Return a type for argparse: a number that is not below ``least``, nor equal to it with ``above``."""

    def number(text: str) -> int | float:
        wanted = f"a {'whole ' if kind is int else ''}number {'above' if above else 'of at least'} {least:g} is wanted"
        try:
            found = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {wanted}") from error
        if not (least < found if above else least <= found) or math.isinf(found):  # also for what is no number
            raise argparse.ArgumentTypeError(f"{text!r}: {wanted}")
        return found

    return number


def token_ids(text: str) -> list[int]:
    """Read the value of ``--tokens``.

    Raises:
        SettingsError: a part is no token id; names it.
    """
    found = []
    for part in map(str.strip, text.split(",")):
        if (token := whole(part, _LAST_TOKEN)) is None:
            raise SettingsError(f"--tokens: {part!r} is no token id; give 1,2,3 with numbers from 0 to {_LAST_TOKEN}")
        found.append(token)
    return found


def file_error(what: str, path: Path | str, error: OSError) -> SettingsError:
    """Return the error about a file that cannot be read or written, to raise from the one of the system."""
    return SettingsError(f"{what} {path}: {error.strerror or error}")


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error: whether trying again may help."""
    return EXIT_USAGE if isinstance(error, KvatlasError) and not error.restart_helps else 1
