"""Listed specs: a file in TOML, YAML or JSON with one list of texts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kvatlas.bridge.errors import SettingsError


def read_listing(path: Path, name: str, each: str, check: Callable[[str], object]) -> list[str]:
    """Read the list ``name``, or a document that is a list itself.

    Args:
        path: its ending says which of the three it is; YAML unless ``.toml`` or ``.json``.
        name: of the list.
        each: what an entry is, for the error.
        check: raises a ``SettingsError`` for an entry that is not valid.

    Raises:
        SettingsError: the file cannot be read, has another shape, or an entry is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document: Any
        if path.suffix == ".toml":
            document = tomllib.loads(text)
        elif path.suffix == ".json":
            document = json.loads(text)
        else:
            document = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{name} file {path}: {error}") from error
    listed = document.get(name) if isinstance(document, dict) else document
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise SettingsError(f"{name} file {path}: expected `{name}`, a list of {each}")
    try:
        for item in listed:
            check(item)
    except SettingsError as error:
        raise SettingsError(f"{name} file {path}: {error}") from error
    return listed
