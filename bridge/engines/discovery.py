"""Discovery of engines: a static list, a file looked at again and again, DNS names, engines asked over HTTP."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from pathlib import Path

from kvatlas.bridge.engines.http import is_http, parse_http, specs_over_http
from kvatlas.bridge.engines.listing import read_listing
from kvatlas.bridge.engines.spec import EngineSpec, parse_bind, parse_engine
from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.options import BridgeSettings

log = logging.getLogger(__name__)


def static_specs(settings: BridgeSettings) -> list[EngineSpec]:
    """Return the endpoints that the settings list; addresses of other sources are checked as well.

    Raises:
        SettingsError: an endpoint is not valid.
    """
    if settings.bind and settings.ownership != "all":
        raise SettingsError("bridge.bind needs bridge.ownership=all: an engine is heard only where it connects")
    for text in settings.bind:
        parse_bind(text)
    for text in settings.dns:
        parse_engine(text)
    for text in filter(is_http, settings.engines):
        parse_http(text)
    return [spec for text in settings.engines if not is_http(text) for spec in parse_engine(text)]


async def discover(
    settings: BridgeSettings, known: dict[str, list[EngineSpec]] | None = None, more: Iterable[str] = ()
) -> list[EngineSpec]:
    """Return the endpoints that list, file and names give now.

    Args:
        settings: where to look.
        known: what each DNS name and each engine asked over HTTP gave last, kept up to date here. One that does not
            answer now keeps its endpoints of before, none before its first answer: one never hides what others say.
        more: HTTP specs of further engines to ask.

    Raises:
        SettingsError: the file cannot be read; nothing may be concluded from that about the engines.
    """
    known = {} if known is None else known
    specs = static_specs(settings)
    asked = [*filter(is_http, settings.engines), *more]
    if settings.engines_file:
        listed = await asyncio.to_thread(read_engines, Path(settings.engines_file))
        specs += [spec for text in listed if not is_http(text) for spec in parse_engine(text)]
        asked += filter(is_http, listed)
    sources = dict.fromkeys(settings.dns, resolve) | dict.fromkeys(asked, specs_over_http)
    for text in known.keys() - sources.keys():
        del known[text]
    answers = await asyncio.gather(*(source(text) for text, source in sources.items()), return_exceptions=True)
    for text, answer in zip(sources, answers, strict=True):
        if isinstance(answer, UnresolvedError):
            log.warning("%s; keeping %d endpoints of before", answer, len(known.get(text, [])))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            known[text] = answer
        specs += known.get(text, [])
    return specs


def read_engines(path: Path) -> list[str]:
    """Read ``engines``, a list of endpoint specs, from a TOML, YAML or JSON file; each is checked.

    Raises:
        SettingsError: the file cannot be read, has another shape, or a spec is not valid.
    """
    return read_listing(
        path, "engines", "endpoint specs", lambda text: (parse_http if is_http(text) else parse_engine)(text)
    )


async def resolve(text: str) -> list[EngineSpec]:
    """Return one endpoint per address that the host in a spec's addresses resolves to.

    Raises:
        SettingsError: the spec is not valid.
        UnresolvedError: the name has no address now.
    """
    host = parse_engine(text)[0].live.partition("://")[2].rpartition(":")[0]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnresolvedError(f"DNS name {host}: {error}") from error
    # A pod of two families has an address of each: one is enough.
    old = {str(entry[4][0]) for entry in found if entry[0] == socket.AF_INET}
    addresses = sorted(old or {f"[{entry[4][0]}]" for entry in found if entry[0] == socket.AF_INET6})
    if not addresses:
        raise UnresolvedError(f"DNS name {host}: no IPv4 or IPv6 address")
    return [spec for address in addresses for spec in parse_engine(text.replace(f"://{host}:", f"://{address}:"))]
