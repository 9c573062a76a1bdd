"""Keeping a shared root within its budget from outside the engines.

Safe beside running engines: a name is only taken away while it still leads to the file that was judged, a reader
that has the file open reads on, and an engine that finds a block gone treats it as a miss and announces that.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout, scan
from kvatlas.connector.files.catalog import Catalog, DiskBudget
from kvatlas.connector.files.fs import FileSystem, PosixFileSystem


@dataclass
class Report:
    """What one pass found and did; sizes in bytes.

    Attributes:
        used_bytes: before the pass.
        limit_bytes: the budget.
        blocks: block names found.
        evicted_blocks, evicted_bytes: taken away, or with ``dry_run`` what would be.
        failed: names that could not be taken away.
        stale_files: abandoned temporary files removed.
        directories: directories of fingerprints found.
    """

    used_bytes: int = 0
    limit_bytes: int = 0
    blocks: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    failed: int = 0
    stale_files: int = 0
    directories: list[str] = field(default_factory=list)


def evict_root(
    root: Path,
    budget: DiskBudget,
    *,
    dry_run: bool = False,
    fs: FileSystem | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
    stale_seconds: float = 3600.0,
    quarantine_files: int = 64,
    quarantine_bytes: int = 1 << 30,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Bring all fingerprints below ``root`` together down to the low watermark, longest unused first.

    Raises:
        LayoutError: the root cannot be read.
    """
    files = fs or PosixFileSystem()
    tell = progress or (lambda _: None)
    report = Report()
    catalogs: dict[Path, Catalog] = {}
    try:
        report.limit_bytes = budget.limit_bytes(files.space(root).total)
        names = sorted(entry.name for entry in files.listdir(root) if entry.is_dir)
    except OSError as error:
        raise LayoutError(f"{root}: cannot be read ({error}); name a root that engines offload to") from error
    now = clock_ns()
    for name in names:
        directory = root / name
        with contextlib.suppress(OSError):
            files.stat(directory / layout.MANIFEST_NAME)
            catalog = catalogs[directory] = Catalog()
            for found in scan.scan_blocks(files, directory, now):
                catalog.add(found)
            report.directories.append(name)
            report.blocks += len(catalog)
            report.used_bytes += catalog.used_bytes
            tell(f"{name}: {len(catalog)} blocks, {catalog.used_bytes} bytes")
            if not dry_run:
                report.stale_files += scan.remove_stale_staging(files, directory, now, stale_seconds)
                scan.empty_quarantine(files, directory, quarantine_files, quarantine_bytes)
    excess = budget.excess_bytes(report.used_bytes, report.limit_bytes)
    _take_away(files, catalogs, excess, report, dry_run=dry_run, tell=tell)
    return report


def _take_away(
    files: FileSystem,
    catalogs: dict[Path, Catalog],
    excess: int,
    report: Report,
    *,
    dry_run: bool,
    tell: Callable[[str], None],
) -> None:
    ranked = heapq.merge(
        *(
            [(victim.last_use_ns, str(directory), victim) for victim in catalog.victims(excess)]
            for directory, catalog in catalogs.items()
        )
    )
    for number, (_, directory, victim) in enumerate(ranked):
        if report.evicted_bytes >= excess:
            return
        gone = 0
        for key in victim.keys:
            gone += dry_run or _unlink(files, Path(directory) / layout.block_path(key), victim.inode, report)
        report.evicted_blocks += gone
        if gone == len(victim.keys):
            report.evicted_bytes += victim.size_bytes
        if number % 1000 == 999:
            tell(f"evicted {report.evicted_bytes} of {excess} bytes")


def _unlink(files: FileSystem, path: Path, inode: int, report: Report) -> bool:
    try:
        if files.stat(path).st_ino != inode:
            return False
        files.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        report.failed += 1
        return False
    return True
