"""Settings of the console."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

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
    decisions: Annotated[
        int, Meta(description="newest decisions kept in memory; raise it for a longer look back", ge=100, le=100_000)
    ] = 5_000
    metrics: Annotated[
        list[str], Meta(description="telemetry_listen of a scorer, or a DNS name with an address for each; repeatable")
    ] = []  # noqa: RUF012 - msgspec copies it
