"""Endpoints from files and names."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest

from kvatlas.bridge.engines.discovery import discover, read_engines, resolve
from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.options import BridgeSettings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("e.toml", 'engines = ["tcp://a:1,pod=x", "tcp://b:1,dp=2"]'),
        ("e.yaml", "engines:\n  - tcp://a:1,pod=x\n  - tcp://b:1,dp=2\n"),
        ("e.yml", "- tcp://a:1,pod=x\n- tcp://b:1,dp=2\n"),
        ("e.json", '{"engines": ["tcp://a:1,pod=x", "tcp://b:1,dp=2"]}'),
    ],
)
def test_a_file_lists_endpoints(tmp_path: Path, name: str, text: str) -> None:
    """TOML, YAML and JSON say the same."""
    path = tmp_path / name
    path.write_text(text)
    specs = [spec for text in read_engines(path) for spec in parse_engine(text)]
    assert [(spec.live, spec.pod, spec.rank) for spec in specs] == [
        ("tcp://a:1", "x", 0),
        ("tcp://b:1", "", 0),
        ("tcp://b:2", "", 1),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("e.toml", "engines = ["),
        ("e.json", "{"),
        ("e.yaml", "engines: {a: 1}"),
        ("e.yaml", "engines: [1, 2]"),
        ("e.yaml", "engines: ['tcp://nowhere']"),
        ("e.json", "3"),
        ("e.json", "[" * 100_000),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    """A broken file says nothing about the engines, so it is an error and no empty list."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SettingsError, match=re.escape(str(path))):
        read_engines(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """The same holds for a file that is not there."""
    with pytest.raises(SettingsError, match=r"nothing\.toml"):
        read_engines(tmp_path / "nothing.toml")


async def test_a_name_becomes_its_addresses() -> None:
    """Each address of a DNS name is one endpoint, on both sockets."""
    specs = await resolve("tcp://localhost:5557,tcp://localhost:5558,model=m")
    assert ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", "m") in [(s.live, s.replay, s.model) for s in specs]


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([("fd00::2", 10), ("fd00::1", 10)], ["tcp://[fd00::1]:5557", "tcp://[fd00::2]:5557"]),
        ([("fd00::1", 10), ("10.0.0.1", 2)], ["tcp://10.0.0.1:5557"]),
    ],
)
async def test_a_name_with_ipv6_addresses_is_followed(
    monkeypatch: pytest.MonkeyPatch, addresses: list[tuple[str, int]], expected: list[str]
) -> None:
    """AAAA records are endpoints where a name has no others; a pod of two families is one endpoint."""

    async def answer(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AddressFamily(family), 1, 6, "", (address, 0)) for address, family in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answer)
    assert [spec.live for spec in await resolve("tcp://engines:5557")] == expected


async def test_a_name_that_does_not_resolve_is_an_error() -> None:
    """An unknown name says nothing about the engines behind it."""
    with pytest.raises(SettingsError, match=r"no-such-host\.invalid"):
        await resolve("tcp://no-such-host.invalid:5557")


async def test_a_name_that_no_name_can_be_is_an_error_too() -> None:
    """The resolver refuses some names before it asks anybody."""
    with pytest.raises(UnresolvedError, match=r"a{70}"):
        await resolve(f"tcp://{'a' * 70}.invalid:5557")


async def test_every_source_is_asked(tmp_path: Path) -> None:
    """The static list, the file and the names are joined."""
    path = tmp_path / "e.json"
    path.write_text('["tcp://file:1"]')
    settings = BridgeSettings(engines=["tcp://static:1"], engines_file=str(path), dns=["tcp://127.0.0.1:7"])
    assert [spec.live for spec in await discover(settings)] == ["tcp://static:1", "tcp://file:1", "tcp://127.0.0.1:7"]


async def test_a_name_without_addresses_is_retriable() -> None:
    """A DNS name that nobody is behind yet is told from a bad setting."""
    with pytest.raises(UnresolvedError) as caught:
        await resolve("tcp://nobody.invalid:5557")
    assert caught.value.retriable
    assert "nobody.invalid" in str(caught.value)


async def test_a_name_that_does_not_resolve_hides_nothing() -> None:
    """Other sources count, and a name keeps what it gave last."""
    gone = "tcp://nobody.invalid:5557"
    settings = BridgeSettings(engines=["tcp://static:1"], dns=[gone, "tcp://127.0.0.1:7"])
    assert [spec.live for spec in await discover(settings)] == ["tcp://static:1", "tcp://127.0.0.1:7"]
    known = {gone: await resolve("tcp://127.0.0.1:9")}
    found = await discover(settings, known)
    assert [spec.live for spec in found] == ["tcp://static:1", "tcp://127.0.0.1:9", "tcp://127.0.0.1:7"]
