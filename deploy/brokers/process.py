"""Small helpers around child processes, ports and files, shared by the broker launchers."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Distinct TCP ports that are free on `host` now.

    They are released before this returns, so a caller that binds one must be ready to try again.
    """
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty where there is no file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def read_from(path: Path, start: int) -> str:
    """The text of a file from a byte offset on; empty where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def trouble(log: str, lines: int) -> str:
    """What in a log explains a failure: the last lines that are not mere information, else simply the last lines."""
    everything = log.splitlines()
    told = [line for line in everything if " INFO " not in line]
    return "\n".join((told or everything)[-lines:])


def process_token(pid: int) -> str | None:
    """Something that tells this process from a later one with the same id; None where it is gone.

    On Linux the start time in clock ticks since boot; elsewhere only that the process exists.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return _exists(pid)
    # The command name stands in parentheses and may hold spaces; fields after it are numbered from 3.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _exists(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


class Reaper:
    """Ends a process when this one dies, however it dies.

    A shell waits on a pipe whose other end only we hold: the kernel closes it when we end, also by SIGKILL, and the
    shell then terminates the process. Linux's parent-death signal would do less: it follows the thread that
    started the child, which may be a short-lived pool thread.
    """

    def __init__(self, pid: int) -> None:
        # "read" returns zero when told to stand down, non-zero at the end of the file.
        script = f"read -r _ || kill -TERM {pid}"
        self._shell = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True
        )

    def stand_down(self) -> None:
        """Leave the process alone from now on; call it once the process has ended."""
        if self._shell.stdin is not None and not self._shell.stdin.closed:
            try:
                self._shell.stdin.write(b"done\n")
                self._shell.stdin.close()
            except BrokenPipeError:
                pass
        self._shell.wait()
