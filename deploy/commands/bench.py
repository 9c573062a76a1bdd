"""``kvatlas bench``: finds a benchmark's module and prints its figures.

A benchmark is one module in ``kvatlas.deploy.bench`` with ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which
yields one dict per figure: ``case``, ``value``, ``unit`` and, where they make sense, ``p50``, ``p99``, ``baseline`` and
``ratio``. Its name goes before each, and ``spin``, how fast the machine is at that moment, behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy import bench
from kvatlas.deploy.bench.calibrate import spin

_COLUMNS: Final = ("case", "value", "unit", "p50", "p99", "baseline", "ratio", "spin")


def names() -> list[str]:
    """Return the benchmarks that are here."""
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"{bench.__name__}.{name}")
    except ModuleNotFoundError as error:
        raise SettingsError(f"needs the package {error.name}: pip install 'kvatlas[all]'") from error


def _help(name: str) -> str:
    try:
        return str(_module(name).HELP)
    except SettingsError as error:
        return str(error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand; a benchmark's own come after its name."""
    parser.add_argument("name", metavar="NAME", help="which benchmark; `list` names them")
    parser.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="--json and the benchmark's flags; --help shows them",
    )


def run(args: argparse.Namespace) -> int:
    """Run one benchmark and print its figures as they come: a JSON object a line, or a table.

    Raises:
        SettingsError: there is no such benchmark, or a package that it needs is not installed.
    """
    found = names()
    if args.name == "list":
        for name in found:
            print(f"{name:<16} {_help(name)}")
        return 0
    if args.name.replace("-", "_") not in found:
        raise SettingsError(f"no benchmark {args.name!r}; there are {', '.join(found) or 'none'}")
    module = _module(args.name.replace("-", "_"))
    parser = argparse.ArgumentParser(prog=f"kvatlas bench {args.name}", description=module.HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object a figure and line")
    module.add_arguments(parser)
    options = parser.parse_args(args.rest)
    figures: Iterable[Mapping[str, Any]] = module.run(options)
    if not options.json:
        print(_row(dict(zip(_COLUMNS, _COLUMNS, strict=True))), flush=True)
    for figure in figures:
        told = {"bench": args.name, **figure, "spin": spin()}
        print(json.dumps(told) if options.json else _row(told), flush=True)
    return 0


def _row(figure: Mapping[str, Any]) -> str:
    case, *others = (_cell(figure.get(column, "")) for column in _COLUMNS)
    return f"{case:<44} " + " ".join(f"{other:>12}" for other in others)


def _cell(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, int | float) else str(value))
    )
