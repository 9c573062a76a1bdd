"""Settings of the file tier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvatlas.connector.files.catalog import DiskBudget


@dataclass(frozen=True, kw_only=True)
class FileTierSettings:
    """Settings of the file tier.

    Attributes:
        root: directory that engines and evictors may share.
        blocks_per_file: blocks of one store that go into one file.
        threads: transfers that use the disk at once.
        write_threads: how many of them may be writes; 0 means half, at least one.
        checksum_threads: further threads, which compute checksums while others use the disk.
        queued_write_bytes: stores waiting beyond this are shed.
        bounce_bytes: aligned memory for what direct I/O cannot take as it lies.
        direct: use direct I/O where a probe says that it works.
        fsync: bring each segment to the medium before it is announced. Without it a power cut may lose or tear
            what was stored last; a torn file fails its checksum and is a miss.
        budget: how much the tier may take.
        cpus: CPUs of all these threads; empty leaves placement to the system.
        quarantine_files, quarantine_bytes: damaged files kept for inspection beside the budget, at most so many and
            so large together; the latest stay.
        stale_seconds: age at which a temporary file counts as abandoned, and a file of uses as one to merge.
        distrust_seconds: how long a block that failed with an I/O error is reported absent.
        usage_flush_seconds: how often uses are written to the sidecar at the least, while there are any.
    """

    root: Path
    blocks_per_file: int = 1
    threads: int = 8
    write_threads: int = 0
    checksum_threads: int = 2
    queued_write_bytes: int = 1 << 30
    bounce_bytes: int = 256 << 20
    direct: bool = True
    fsync: bool = False
    budget: DiskBudget = field(default_factory=DiskBudget)
    cpus: tuple[int, ...] = ()
    quarantine_files: int = 64
    quarantine_bytes: int = 1 << 30
    stale_seconds: float = 3600.0
    distrust_seconds: float = 30.0
    usage_flush_seconds: float = 10.0
