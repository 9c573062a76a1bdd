"""How a Redis or Valkey server is reached: TLS, user, timeouts, further tries; for mirror and library alike."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvatlas.bridge.errors import SettingsError


def connect(
    url: str, *, cafile: str = "", password_file: str = "", timeout_seconds: float = 2.0, retries: int = 4
) -> Any:
    """Return a client; nothing is opened before it is used.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with the ACL user and password when there is one.
        cafile: CA certificates for ``rediss://``; empty takes the system's.
        password_file: file that holds the password, so that the address need not.
        timeout_seconds: for one exchange with the server.
        retries: further tries of one exchange when the connection fails, with growing pauses.

    Raises:
        SettingsError: the address or the password file cannot be used.
    """
    options: dict[str, Any] = {}
    if url.startswith("rediss://"):
        options = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": cafile or None}
    if password_file:
        try:
            options["password"] = Path(password_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"Redis password file {password_file}: {error.strerror}") from error
    try:
        return aioredis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries),
            retry_on_error=[RedisConnectionError, RedisTimeoutError],
            **options,
        )
    except ValueError as error:
        raise SettingsError(f"Redis address {where(url)}: {error}") from error


def where(url: str) -> str:
    """Return an address for people: without user and password."""
    return url.rsplit("@", 1)[-1]


def escaped(prefix: bytes) -> bytes:
    """Return a SCAN pattern that matches what begins with ``prefix``, whatever it contains."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\" else bytes([byte]) for byte in prefix) + b"*"
