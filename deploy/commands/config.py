"""``kvatlas config``."""

from __future__ import annotations

import argparse
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime import settings
from kvatlas.bridge.runtime.settings import ENV_FILE, Field
from kvatlas.deploy.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("section", nargs="*", help=f"only these sections: {', '.join(common.SECTIONS)}")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file to read as the services do [{ENV_FILE}]"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the reference page; takes no values from anywhere")
    form.add_argument("--json", action="store_true", help="one JSON object: section -> setting -> value")


def run(args: argparse.Namespace) -> int:
    """Print the settings that a service started here would take, or their reference.

    Raises:
        SettingsError: a section is unknown, or a value is bad.
    """
    names = args.section or common.installed_sections()
    for name in names:
        if name not in common.SECTIONS:
            raise SettingsError(f"unknown section {name!r}; known: {', '.join(common.SECTIONS)}")
    if args.markdown:
        print(reference(names), end="")
        return 0
    document = common.read_document(args.config, os.environ)
    values = {name: _values(name, document) for name in names}
    if args.json:
        print(json.dumps(values, indent=2))
        return 0
    for name in names:
        print(f"[{name}]")
        for field in settings.fields_of(common.section_class(name)):
            value = values[name].get(field.name)
            mark = "" if value == msgspec.to_builtins(field.default) else "   # changed"
            shown = "(required, not set)" if field.required and value is None else _toml(value)
            print(f"{field.name} = {shown}{mark}")
        print()
    return 0


def reference(names: typing.Sequence[str]) -> str:
    """Return the reference page of settings in Markdown."""
    lines = [
        "# Settings",
        "",
        f"Flags win over environment variables, which win over the TOML file of `--config` or `{ENV_FILE}`.",
        "In a list's environment variable, `;` parts the items. Commands that run several services put the section's",
        "name before its flags (`--bridge-...`). This page is made by `kvatlas config --markdown`.",
        "",
    ]
    for name in names:
        prefix = "log_" if name == "log" else ""
        lines += [
            f"## `[{name}]`",
            "",
            "| setting | type | default | meaning | flag | environment |",
            "|" + "---|" * 6,
        ]
        for field in settings.fields_of(common.section_class(name)):
            default = "required" if field.required else f"`{_toml(msgspec.to_builtins(field.default))}`"
            lines.append(
                f"| `{field.name}` | {_type(field)} | {default} | {_cell(field.help)} "
                f"| `{settings.flag_name(field.name, prefix)}` | `{settings.env_name(name, field.name)}` |"
            )
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _values(name: str, document: dict[str, dict[str, Any]]) -> dict[str, Any]:
    section = common.section_class(name)
    try:
        loaded = settings.load(name, section, environ=os.environ, document=document)
    except SettingsError:
        missing = [field for field in settings.fields_of(section) if field.required]
        if not missing:
            raise
        # A required setting may come as a flag of the service; everything else is still shown.
        return {field.name: msgspec.to_builtins(field.default) for field in settings.fields_of(section)}
    values: dict[str, Any] = msgspec.to_builtins(loaded)
    return {key: "***" if key.endswith("password") and value else value for key, value in values.items()}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return '""' if value is None else json.dumps(value)


def _type(field: Field) -> str:
    origin = get_origin(field.type)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.type))
    if origin in (list, tuple):
        return "list of " + _name(get_args(field.type)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in get_args(field.type))
    return _name(field.type)


def _name(hint: Any) -> str:
    return {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "NoneType": "nothing"}.get(
        getattr(hint, "__name__", str(hint)), getattr(hint, "__name__", str(hint))
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
