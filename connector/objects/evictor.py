"""Keeping a bucket's prefix within a budget from outside the engines: the one place that lists objects.

Safe beside running engines: an engine that finds an object gone treats it as a miss and announces that. Last uses come
from the engines' own objects; a block that nobody noted counts as used when it was stored.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import Missing
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.evictor import Report
from kvatlas.connector.files.usage import SUFFIX, decode, usage_key
from kvatlas.connector.objects.client import Objects, ObjectStoreError, connect
from kvatlas.connector.objects.settings import ObjectTierSettings

#: Objects that one request removes at the most (S3's own limit).
_BATCH: Final = 1000
#: Age at which a writer's uses are removed: whoever wrote them is long gone, or would have written again.
_USES_SECONDS: Final = 30 * 86400.0


class _Found(NamedTuple):
    used_ns: int
    size_bytes: int
    path: str


def evict_prefix(
    settings: ObjectTierSettings,
    budget: DiskBudget,
    *,
    dry_run: bool = False,
    objects: Objects | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Bring all fingerprints below the address together down to the low watermark, longest unused first.

    Args:
        settings: the address and how to reach it.
        budget: its ``max_bytes`` counts; a bucket has no size to take a share of.
        dry_run: remove nothing.
        objects: the store; a connection by the settings when None.
        clock_ns: the clock.
        progress: told what is done.

    Raises:
        LayoutError: the store does not answer, or does not let us list.
    """
    store = objects or connect(settings)
    tell = progress or (lambda _: None)
    report = Report(limit_bytes=budget.limit_bytes(budget.max_bytes or 1 << 62))
    try:
        found = _look(store, report, clock_ns(), dry_run=dry_run)
    except ObjectStoreError as error:
        raise LayoutError(f"{settings.url}: cannot be listed ({error}); check address and rights") from error
    tell(f"{report.blocks} blocks, {report.used_bytes} bytes in {len(report.directories)} directories")
    excess = budget.excess_bytes(report.used_bytes, report.limit_bytes)
    for batch in _batches(found, excess):
        if not dry_run:
            try:
                store.delete([item.path for item in batch])
            except ObjectStoreError as error:
                tell(str(error))
                report.failed += len(batch)
                continue
        report.evicted_blocks += len(batch)
        report.evicted_bytes += sum(item.size_bytes for item in batch)
        tell(f"evicted {report.evicted_bytes} of {excess} bytes")
    return report


def _look(store: Objects, report: Report, now_ns: int, *, dry_run: bool) -> list[_Found]:
    """Return the blocks, with their last uses, and remove uses that are long out of date."""
    uses: dict[bytes, int] = {}
    blocks: list[tuple[bytes, _Found]] = []
    for item in store.list(""):
        directory, _, rest = item.path.partition("/")
        folder, _, name = rest.partition("/")
        key = layout.key_of(name.rpartition("/")[2]) if folder == layout.BLOCKS else None
        if key is not None:
            # A time "from the future" (the clock jumped back) counts as now.
            blocks.append((key, _Found(min(item.modified_ns, now_ns), item.size_bytes, item.path)))
            report.used_bytes += item.size_bytes
        elif rest == layout.MANIFEST_NAME:
            report.directories.append(directory)
        elif folder == layout.USAGE and name.endswith(SUFFIX):
            if now_ns - item.modified_ns > _USES_SECONDS * 1e9:
                report.stale_files += 1
                if not dry_run:
                    store.delete([item.path])
            else:
                _read_uses(store, item.path, uses)
    report.blocks = len(blocks)
    return [found._replace(used_ns=max(found.used_ns, uses.get(usage_key(key), 0))) for key, found in blocks]


def _read_uses(store: Objects, path: str, uses: dict[bytes, int]) -> None:
    try:
        read = decode(bytes(store.get(path).body))
    except Missing:
        return
    for key, used_ns in read.items():
        uses[key] = max(used_ns, uses.get(key, 0))


def _batches(found: list[_Found], excess: int) -> Iterator[list[_Found]]:
    """Yield what is to go, longest unused first, as many at a time as one request takes."""
    freed = itertools.accumulate(sorted(found), lambda total, item: total + item.size_bytes, initial=0)
    chosen = [item for item, before in zip(sorted(found), freed, strict=False) if before < excess]
    for at in range(0, len(chosen), _BATCH):
        yield chosen[at : at + _BATCH]
