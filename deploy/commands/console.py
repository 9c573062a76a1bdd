"""``kvatlas console``."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import secrets
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.deploy.brokers.rights import check_rights, rights_of
from kvatlas.deploy.cli import common
from kvatlas.deploy.commands import score
from kvatlas.deploy.commands.at import add_rebuild_arguments, options_of
from kvatlas.deploy.console.options import ConsoleSettings
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.console.server import Console
from kvatlas.scorer.client import ScorerClient

HELP: Final = "web page of fleet, prefixes, decisions and flow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log", "console")
    score.add_connection(parser)
    add_rebuild_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until SIGTERM or Ctrl-C."""
    sections = common.load_sections(args)
    configure_logging(sections["log"], "console")
    return asyncio.run(_serve(args, sections))


async def _serve(args: argparse.Namespace, sections: dict[str, msgspec.Struct]) -> int:
    stop = common.async_stop_event()
    settings, kafka = sections["console"], sections["kafka"]
    assert isinstance(settings, ConsoleSettings)
    await check_rights(kafka, rights_of("top", kafka))  # type: ignore[arg-type]
    token, told = token_of(settings)

    def connect(scorer_token: str) -> ScorerClient:
        return score.connect(args, token=scorer_token)

    console = Console(settings, kafka, Past(kafka, options_of(args)), connect, token)  # type: ignore[arg-type]
    try:
        address = await console.start()
        print(f"ready console={address}/{f'#token={token}' if told else ''}", flush=True)
        await stop.wait()
    finally:
        await console.stop()
    return 0


def token_of(settings: ConsoleSettings) -> tuple[str, bool]:
    """Return the token that opens the page, and whether it was made here and so has to be told.

    Raises:
        SettingsError: the token's file cannot be read or is empty.
    """
    if settings.page_token_file:
        try:
            token = Path(settings.page_token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"console.page_token_file {settings.page_token_file}: {error}") from error
        if not token:
            raise SettingsError(f"console.page_token_file {settings.page_token_file} is empty")
        return token, False
    host = settings.listen.rpartition(":")[0].strip("[]")
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    return ("", False) if alone else (secrets.token_urlsafe(24), True)
