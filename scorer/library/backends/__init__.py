"""Where the index lives: backends behind one small protocol, all holding the same bytes."""

from kvatlas.scorer.library.backends.base import Backend, Stats
from kvatlas.scorer.library.backends.memory import MemoryBackend

__all__ = ["Backend", "MemoryBackend", "Stats"]
