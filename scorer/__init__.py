"""From a prompt to a score per pod."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvatlas.scorer.library.indexer import Indexer
    from kvatlas.scorer.library.options import IndexerOptions
    from kvatlas.scorer.library.sync import SyncIndexer

__all__ = ["Indexer", "IndexerOptions", "SyncIndexer"]

_WHERE: Final = {"Indexer": "library.indexer", "IndexerOptions": "library.options", "SyncIndexer": "library.sync"}


def __getattr__(name: str) -> Any:
    """Import a class of the library when it is asked for: who uses one module of the package pays for it alone."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
