"""Serving addresses: a static list, a watched file, DNS names, and the pods that events tell of.

One spec is one pod: ``HOST:PORT[,pod=NAME][,model=NAME][,role=...][,engine=...][,ranks=N][,metrics=URL]``. Its ranks
listen on the ports that follow; rank ``r`` of more than one is the pod id ``NAME@dp<r>``, as its events are known.
Without a name a pod is called ``HOST:PORT``, which is how llm-d's topics name pods.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from kvatlas.bridge.engines.listing import read_listing
from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.model.numbers import RANKS_MAX, port_of, whole
from kvatlas.bridge.model.pod_ids import rank_of, serving_address
from kvatlas.bridge.model.records import GONE, PodRecord
from kvatlas.scorer.picker.endpoints import ROLES, Endpoint

_OPTIONS: Final = ("pod", "model", "role", "engine", "ranks", "metrics")
_ENGINES: Final = ("vllm", "sglang")


def parse_endpoint(text: str) -> list[Endpoint]:
    """Read one spec; returns an endpoint per rank.

    Raises:
        SettingsError: the text is no spec; names the part.
    """
    address, *parts = (part.strip() for part in text.split(","))
    host, port = split_address(address, text)
    options = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in _OPTIONS or not value:
            raise SettingsError(f"endpoint {text!r}: {part!r} is none of {', '.join(_OPTIONS)}=VALUE")
        options[name] = value
    role = ROLES.get(options.get("role", ""))
    if role is None:
        raise SettingsError(f"endpoint {text!r}: role={options['role']!r}; known: {', '.join(filter(None, ROLES))}")
    engine = options.get("engine", "vllm")
    if engine not in _ENGINES:
        raise SettingsError(f"endpoint {text!r}: engine={engine!r}; known: {', '.join(_ENGINES)}")
    ranks = whole(options.get("ranks", "1"), RANKS_MAX)
    if not ranks or port + ranks - 1 > 65_535:
        said = options.get("ranks", "1")
        raise SettingsError(f"endpoint {text!r}: ranks={said!r}; expected 1 to {RANKS_MAX}, ports up to 65535")
    found = []
    for rank in range(ranks):
        here = joined(host, port + rank)
        pod = options.get("pod") or joined(host, port)
        found.append(
            Endpoint(
                address=here,
                pod=f"{pod}@dp{rank}" if ranks > 1 else pod,
                model=options.get("model", ""),
                role=role,
                engine=engine,
                metrics=options.get("metrics", f"http://{here}/metrics"),
            )
        )
    return found


def split_address(address: str, where: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; IPv6 in brackets.

    Raises:
        SettingsError: it is not one; ``where`` is named.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (number := port_of(port)):
        raise SettingsError(f"endpoint {where!r}: expected HOST:PORT first")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise SettingsError(f"endpoint {where!r}: an IPv6 address is written in brackets, [ADDRESS]:PORT")
    return host.strip("[]"), number


def joined(host: str, port: int) -> str:
    """Return ``HOST:PORT``, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_endpoints(path: Path) -> list[Endpoint]:
    """Read ``endpoints``, a list of specs, from a TOML, YAML or JSON file.

    Raises:
        SettingsError: the file cannot be read, has another shape, or a spec is not valid.
    """
    listed = read_listing(path, "endpoints", "HOST:PORT[,...]", parse_endpoint)
    return [endpoint for item in listed for endpoint in parse_endpoint(item)]


async def resolve(text: str) -> list[Endpoint]:
    """Return the endpoints of every address that a spec's host resolves to.

    Raises:
        SettingsError: the spec is not valid.
        UnresolvedError: the name has no address now.
    """
    address = text.partition(",")[0].strip()
    host, port = split_address(address, text)
    parse_endpoint(text)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnresolvedError(f"DNS name {host}: {error}") from error
    addresses = sorted({str(entry[4][0]) for entry in found})
    rest = text.partition(",")[2]
    return [
        endpoint for one in addresses for endpoint in parse_endpoint(f"{joined(one, port)}{',' + rest if rest else ''}")
    ]


def from_pods(records: Iterable[PodRecord], serving_port: int) -> list[Endpoint]:
    """Return the endpoints that pods known from their events tell of themselves.

    A pod id that is an address, as llm-d's topics have it, is the serving address; else it is the host that its events
    come from, with the port of the settings. A silent pod may be idle, so only those that are gone are left out.
    """
    found = []
    for record in records:
        address = serving_address(record.pod)
        if not address and serving_port and record.endpoint:
            host = record.endpoint.partition("://")[2].rpartition(":")[0].strip("[]")
            port = serving_port + (rank_of(record.pod) or 0)
            if host and port < 65_536:
                address = joined(host, port)
        if address:
            engine = record.engine if record.engine in _ENGINES else "vllm"
            found.append(
                Endpoint(
                    address,
                    record.pod,
                    record.model,
                    ready=record.state != GONE,
                    engine=engine,
                    metrics=f"http://{address}/metrics",
                )
            )
    return found


def merged(sources: Iterable[Iterable[Endpoint]], pods: Mapping[str, PodRecord]) -> list[Endpoint]:
    """Join sources by address, the first one winning; what a pod's events tell of it is put in.

    A pod of which no events are known by its name, but by its address, as llm-d's topics have it, is known by that.
    """
    found: dict[str, Endpoint] = {}
    for source in sources:
        for endpoint in source:
            found.setdefault(endpoint.address, endpoint)
    joined_ones = []
    for endpoint in found.values():
        endpoint = endpoint._replace(pod=_known_as(endpoint, pods))  # noqa: PLW2901 - the same one, better known
        record = pods.get(endpoint.pod)
        if record is not None and not endpoint.model and record.model:
            endpoint = endpoint._replace(model=record.model)  # noqa: PLW2901 - the same one, better known
        joined_ones.append(endpoint)
    return sorted(joined_ones)


def _known_as(endpoint: Endpoint, pods: Mapping[str, PodRecord]) -> str:
    pod, address = endpoint.pod, endpoint.address
    return next((name for name in (pod, address, f"{address}@dp{rank_of(pod)}") if name in pods), pod)
