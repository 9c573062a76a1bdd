"""Options of resolution from a worker's settings; without Faust, since tools ask for them too."""

from __future__ import annotations

from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.resolver import ResolveOptions


def resolve_options(settings: WorkerSettings) -> ResolveOptions:
    """Return the pure part's options from a worker's settings."""
    return ResolveOptions(
        block_size_tokens=settings.block_size_tokens,
        announcements=settings.announcements,
        clears=settings.clears,
        strict_gaps=settings.strict_gaps,
    )
