"""Damaged local state: set aside for a look, bounded, so that it is rebuilt from its changelog.

RocksDB's binding raises bare exceptions, so what went wrong is read from their texts, here alone.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Final

from kvatlas.bridge.errors import causes
from kvatlas.streams import metrics
from kvatlas.streams.errors import DamagedError, StateFolderError, StoreError

logger = logging.getLogger(__name__)

#: Folder beside the tables that keeps what was set aside.
KEPT: Final = "damaged"
_MOST_KEPT: Final = 4
_MOST_BYTES: Final = 256 * 1024 * 1024
_MARK: Final = ".unreadable"

_FULL: Final = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
_FORBIDDEN: Final = tuple(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EROFS))
_SHORT: Final = tuple(os.strerror(code) for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
_LOCKED: Final = ("lock hold by", "While lock file")


def meaning(path: Path, error: BaseException) -> StoreError:
    """Return what an error of RocksDB means for the database in a folder.

    What is neither a lock, a right nor a want of space, memory or descriptors is damage: it stays until the files go.
    """
    text = str(error)
    if (full := full_disk(error, str(path))) is not None:
        return full
    if any(word in text for word in _LOCKED):
        return StoreError(f"the table partition in {path} is in use: {text}. Stop the process that uses it")
    if any(word in text for word in _FORBIDDEN):
        return StateFolderError(f"[worker] state_dir: {path} cannot be used: {text}; give this account the right to it")
    if any(word in text for word in _SHORT):
        return StoreError(f"the table partition in {path} cannot be used now: {text}")
    return DamagedError(f"the table partition in {path} is damaged: {text}")


def full_disk(error: BaseException | None, folder: str) -> StateFolderError | None:
    """Return what an error and its causes say of a full disk, None where they say nothing of it."""
    for found in causes(error):
        if isinstance(found, StateFolderError):
            return found
        if any(word in str(found) for word in _FULL):
            return StateFolderError(
                f"[worker] state_dir {folder}: the disk is full ({found}); free some of it or take a larger one, then "
                "start the worker again. Nothing is lost: it reads from the changelogs what is not on its disk"
            )
    return None


def mark(path: Path, reason: str) -> None:
    """Have a database set aside at the next start: the process that found the damage still has it open."""
    try:
        _mark_of(path).write_text(reason, encoding="utf-8")
    except OSError as error:
        logger.warning("%s: cannot be marked as damaged, so the next start looks at it again: %s", path, error)


def set_aside_marked(path: Path) -> bool:
    """Set a database aside that was found damaged while it was in use; returns whether it was."""
    found = _mark_of(path)
    if not found.exists():
        return False
    try:
        reason = found.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = str(error)
    set_aside(path, reason)
    _remove(found)
    return True


def set_aside(path: Path, reason: str) -> None:
    """Move a file or folder out of the way, into ``damaged`` beside it; the oldest there go when it becomes much.

    Raises:
        StateFolderError: it can neither be moved nor removed.
    """
    logger.error("%s is damaged and set aside, to be rebuilt from the changelog: %s", path, reason)
    metrics.DAMAGED.labels(path.suffix.lstrip(".") or "file").inc()
    kept = path.parent / KEPT
    try:
        if kept.exists() and not kept.is_dir():
            kept.unlink()
        kept.mkdir(exist_ok=True)
        target = kept / f"{path.name}-{time.time_ns()}"
        path.rename(target)
        _bound(kept, newest=target)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s cannot be kept for a look: %s", path, error)
        _remove(path)
    if path.exists():
        raise StateFolderError(f"[worker] state_dir: {path} is damaged and cannot be removed; remove it by hand")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a file that stands in the place of one is set aside.

    Raises:
        StateFolderError: it cannot be made.
    """
    for _ in range(len(folder.parents) + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            wrong = next(place for place in (folder, *folder.parents) if place.exists() and not place.is_dir())
            set_aside(wrong, "a file stands where a folder belongs")
        except OSError as error:
            raise StateFolderError(f"[worker] state_dir: {folder} cannot be made: {error.strerror}") from error
        else:
            return


def _mark_of(path: Path) -> Path:
    return path.with_name(path.name + _MARK)


def _bound(kept: Path, newest: Path) -> None:
    """Remove what was set aside longest ago; of the newest, only the largest files."""
    entries = sorted(kept.iterdir(), key=lambda entry: entry.name.rpartition("-")[2])
    others = [entry for entry in entries if entry != newest]
    while others and (len(others) >= _MOST_KEPT or _bytes(kept) > _MOST_BYTES):
        _remove(others.pop(0))
    files = sorted((file for file in kept.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    while files and _bytes(kept) > _MOST_BYTES:
        _remove(files.pop())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
