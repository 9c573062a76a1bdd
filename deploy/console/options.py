"""Settings of the console, and the files that they name."""

from __future__ import annotations

import ipaddress
import secrets
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from msgspec import Meta

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import Section


class ConsoleSettings(Section, frozen=True, kw_only=True):
    """The console."""

    listen: Annotated[str, Meta(description="host:port of the page; port 0 takes a free one")] = "127.0.0.1:8090"
    page_token_file: Annotated[
        str,
        Meta(
            description="file with the token that opens the page; without one a token is made at the start, printed, "
            "and asked for unless the page listens on loopback alone"
        ),
    ] = ""
    scorer: Annotated[
        str,
        Meta(
            description="scorer to ask: HOST:PORT or unix:PATH[,token=FILE][,ca=FILE|system][,cert=FILE,key=FILE]; "
            "a token of the console's own is for readers who bring none: whoever opens the page sees what it may"
        ),
    ] = "127.0.0.1:50051"
    metrics: Annotated[
        list[str], Meta(description="telemetry_listen of a scorer, or a DNS name with an address for each; repeatable")
    ] = []  # noqa: RUF012 - msgspec copies it


def token_of(settings: ConsoleSettings) -> tuple[str, bool]:
    """Return the token that opens the page, and whether it was made here and so has to be told.

    Raises:
        SettingsError: the token's file cannot be read or is empty.
    """
    if settings.page_token_file:
        token = read_file(settings.page_token_file, "page_token_file").decode(errors="replace").strip()
        if not token:
            raise SettingsError(f"console.page_token_file {settings.page_token_file} is empty")
        return token, False
    return ("", False) if is_loopback(settings.listen) else (secrets.token_urlsafe(24), True)


def is_loopback(address: str) -> bool:
    """Whether a ``host[:port]`` names this machine alone."""
    try:
        host = urlsplit(f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ScorerAddress(NamedTuple):
    """Where the scorer is and how it is reached.

    Attributes:
        address: ``host:port`` or ``unix:PATH``.
        token: the console's own bearer token, empty for none.
        tls: whether to use TLS.
        ca, cert, key: PEM; empty ca trusts the machine's.
    """

    address: str
    token: str = ""
    tls: bool = False
    ca: bytes = b""
    cert: bytes = b""
    key: bytes = b""

    @classmethod
    def of(cls, text: str) -> ScorerAddress:
        """Read the setting ``scorer``.

        Raises:
            SettingsError: a part is none, or a file cannot be read.
        """
        address, *parts = (part.strip() for part in text.split(","))
        given = dict(part.partition("=")[::2] for part in parts)
        for name, file in given.items():
            if name not in ("token", "ca", "cert", "key") or not file:
                raise SettingsError(f"console.scorer {text!r}: {name!r} is none of token, ca, cert, key=FILE")
        if ("cert" in given) != ("key" in given):
            raise SettingsError(f"console.scorer {text!r}: cert and key go together")
        trusted = "" if given.get("ca") == "system" else given.get("ca", "")
        return cls(
            address,
            read_file(given.get("token", ""), "scorer token").decode(errors="replace").strip(),
            bool(given.keys() - {"token"}),
            read_file(trusted, "scorer ca"),
            read_file(given.get("cert", ""), "scorer cert"),
            read_file(given.get("key", ""), "scorer key"),
        )


def read_file(path: str, setting: str) -> bytes:
    """Return what a file of the settings holds, nothing for an empty path.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise SettingsError(f"console.{setting} {path}: {error.strerror}") from error
