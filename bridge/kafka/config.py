"""Kafka connections from settings, in the words of aiokafka; the only place that reads credentials."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

from aiokafka.helpers import create_ssl_context

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings


def client_config(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """Return the keyword arguments that every aiokafka client takes.

    Raises:
        SettingsError: a certificate or password file is missing, or SASL lacks its user.
    """
    config: dict[str, Any] = {
        "bootstrap_servers": settings.brokers,
        "client_id": client_id,
        "security_protocol": settings.security_protocol,
    }
    if settings.security_protocol in ("SSL", "SASL_SSL"):
        config["ssl_context"] = ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        if not settings.sasl_username:
            raise SettingsError(f"[kafka] security_protocol {settings.security_protocol} needs sasl_username")
        config["sasl_mechanism"] = settings.sasl_mechanism
        config["sasl_plain_username"] = settings.sasl_username
        config["sasl_plain_password"] = password(settings)
    return config


def is_loopback(settings: KafkaSettings) -> bool:
    """Whether the brokers are on this machine."""
    return settings.brokers.startswith(("127.", "localhost"))


def pace_metadata(client: Any, seconds: float = 0.2) -> None:
    """Make an aiokafka client wait after a metadata request that no broker answered.

    Its sender asks again at once: with every broker down and connections refused that is thousands of times a
    second, each of them logged. It has no setting for this.
    """
    update = client._metadata_update

    async def paced(*arguments: Any) -> bool:
        done: bool = await update(*arguments)
        if not done:
            await asyncio.sleep(seconds)
        return done

    client._metadata_update = paced


def password(settings: KafkaSettings) -> str:
    """Return the SASL password, from its file when one is named.

    Raises:
        SettingsError: the file cannot be read, or there is no password at all.
    """
    if settings.sasl_password_file:
        try:
            return Path(settings.sasl_password_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(
                f"[kafka] sasl_password_file {settings.sasl_password_file}: {error.strerror}"
            ) from error
    if not settings.sasl_password:
        raise SettingsError("[kafka] SASL needs sasl_password_file or sasl_password")
    return settings.sasl_password


def ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    """Return the TLS context: given CA or the system's, client certificate when one is named.

    Raises:
        SettingsError: a file is missing or is not PEM.
    """
    try:
        context: ssl.SSLContext = create_ssl_context(
            cafile=settings.ssl_cafile or None,
            certfile=settings.ssl_certfile or None,
            keyfile=settings.ssl_keyfile or None,
        )
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"[kafka] ssl_cafile {settings.ssl_cafile!r}, ssl_certfile {settings.ssl_certfile!r}, "
            f"ssl_keyfile {settings.ssl_keyfile!r}: {error}"
        ) from error
    return context
