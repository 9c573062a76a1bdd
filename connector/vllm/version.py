"""Which vLLM the adapter was checked against."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Final

from kvatlas.connector.errors import UnsupportedEngineError

#: ``(major, minor)`` releases whose offload interface the adapter implements and is tested with.
SUPPORTED: Final = ((0, 33),)


def check_version(found: str | None = None) -> str:
    """Return the installed vLLM's version when it is supported.

    Args:
        found: a version to judge in place of the installed one.

    Raises:
        UnsupportedEngineError: vLLM is missing or of another release; its offload interface changes with nearly
            every release, so nothing is guessed.
    """
    names = ", ".join(f"{major}.{minor}.*" for major, minor in SUPPORTED)
    if found is None:
        try:
            found = metadata.version("vllm")
        except metadata.PackageNotFoundError as error:
            raise UnsupportedEngineError(f"vLLM is not installed; supported: {names}") from error
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or (int(match[1]), int(match[2])) not in SUPPORTED:
        raise UnsupportedEngineError(
            f"vLLM {found} is not supported by this kvatlas connector; supported: {names}. "
            "Install one of those, or a kvatlas made for yours"
        )
    return found
