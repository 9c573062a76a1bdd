"""Settings of the console, and the files that they name."""

from __future__ import annotations

import ipaddress
import secrets
from pathlib import Path
from typing import Annotated

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
    scorer: Annotated[str, Meta(description="scorer to ask, host:port or unix:PATH")] = "127.0.0.1:50051"
    token_file: Annotated[
        str,
        Meta(
            description="file with the console's own bearer token at the scorer, for readers who bring none: whoever "
            "opens the page then sees what this token may"
        ),
    ] = ""
    tls: Annotated[bool, Meta(description="reach the scorer with TLS, trusting the machine's CAs")] = False
    tls_cafile: Annotated[str, Meta(description="reach the scorer with TLS, trusting this CA (PEM)")] = ""
    tls_certfile: Annotated[str, Meta(description="own certificate for mutual TLS with the scorer (PEM)")] = ""
    tls_keyfile: Annotated[str, Meta(description="key of tls_certfile (PEM)")] = ""
    snapshots: Annotated[
        str, Meta(description="folder of saved states (`kvatlas at MOMENT save`), which past moments go on from")
    ] = ""
    decisions: Annotated[
        int, Meta(description="newest decisions kept in memory; raise it for a longer look back", ge=100, le=100_000)
    ] = 5_000
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
    host = settings.listen.rpartition(":")[0].strip("[]")
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    return ("", False) if alone else (secrets.token_urlsafe(24), True)


def read_file(path: str, setting: str) -> bytes:
    """Return what a file of the settings holds, nothing for an empty path.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise SettingsError(f"console.{setting} {path}: {error.strerror}") from error
