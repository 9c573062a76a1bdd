"""Opening a fingerprint's directory: its folders and its manifest."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import Final

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.fs import FileSystem, read_full, write_full
from kvatlas.connector.files.layout import Fingerprint

log = logging.getLogger(__name__)

_REFUSED: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def prepare(fs: FileSystem, directory: Path, fingerprint: Fingerprint, writer: str) -> bool:
    """Make the folders and the manifest of a directory, or check the manifest that is there.

    Args:
        fs: the file system.
        directory: the fingerprint's directory.
        fingerprint: what the manifest must say.
        writer: makes the temporary name unique among processes that share the directory.

    Returns:
        Whether the directory can be written.

    Raises:
        LayoutError: it belongs to another fingerprint, or cannot be made for another reason than permission.
    """
    manifest = directory / layout.MANIFEST_NAME
    try:
        for name in (layout.BLOCKS, layout.STAGING, layout.QUARANTINE, layout.USAGE):
            fs.mkdir(directory / name)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise LayoutError(f"{directory}: cannot be made ({error}); check the root") from error
        check(fs, manifest, fingerprint)
        return _refused(directory, error)
    if check(fs, manifest, fingerprint):
        # Folders that are there already say nothing: a mount may be read-only now.
        return _takes_files(fs, directory, writer)
    temporary = directory / layout.STAGING / f"{writer}-manifest.tmp"
    try:
        fd = fs.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            write_full(fs, fd, [memoryview(layout.encode_manifest(fingerprint))], 0)
            fs.fsync(fd)
        finally:
            fs.close(fd)
        fs.replace(temporary, manifest)
    except OSError as error:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        if error.errno in _REFUSED:
            return _refused(directory, error)
        raise LayoutError(f"{manifest}: cannot be written ({error}); check the root") from error
    return True


def _takes_files(fs: FileSystem, directory: Path, writer: str) -> bool:
    probe = directory / layout.STAGING / f"{writer}-probe.tmp"
    try:
        fs.close(fs.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        fs.unlink(probe)
    except OSError as error:
        if error.errno in _REFUSED:
            return _refused(directory, error)
        # A full or ailing disk may get better: stores try, and report what becomes of them.
    return True


def _refused(directory: Path, error: OSError) -> bool:
    log.warning(
        "%s cannot be written (%s): blocks are loaded from it and none are stored; restart once it can be",
        directory, error.strerror,
    )  # fmt: skip
    return False


def check(fs: FileSystem, path: Path, fingerprint: Fingerprint) -> bool:
    """Return whether a manifest is there; it is this fingerprint's then.

    Raises:
        LayoutError: it is another's, or cannot be read.
    """
    try:
        fd = fs.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        memory = bytearray(fs.fstat(fd).st_size)
        got = read_full(fs, fd, [memoryview(memory)], 0) if memory else 0
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error}); check the root") from error
    finally:
        fs.close(fd)
    layout.check_manifest(bytes(memory[:got]), fingerprint, str(path))
    return True
