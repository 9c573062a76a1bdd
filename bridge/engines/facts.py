"""Facts of an engine as its own HTTP endpoints tell them: event sockets, ranks, models, block size, version. Pure.

vLLM answers ``GET /kv_event_sources`` (0.31 on), ``/v1/models``, ``/version`` and ``/metrics``; SGLang answers
``GET /server_info`` (0.5.14 on, ``/get_server_info`` before) and ``/v1/models``. What an engine does not say is None
here, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from kvatlas.bridge.model.numbers import RANKS_MAX, port_of, whole

SGLANG: Final = "sglang"

#: Hosts that say "everywhere on my machine": the engine's own host stands for them.
_WILDCARDS: Final = frozenset({"*", "0.0.0.0", "::", "[::]", ""})  # noqa: S104 - compared with, not bound to
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
_CONFIG: Final = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
#: vLLM counts drafts only where speculative decoding is on.
_DRAFTS: Final = re.compile(r"^vllm:spec_decode_num_draft", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class EventSource(msgspec.Struct, frozen=True, kw_only=True):
    """The event sockets of one data-parallel rank.

    Attributes:
        rank: the rank.
        live: ZMQ address of the PUB socket.
        replay: ZMQ address of the ROUTER socket, empty when there is none.
        topic: first frame of the rank's messages.
    """

    rank: int
    live: str
    replay: str = ""
    topic: str = ""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine tells of itself.

    Attributes:
        url: where it was asked, without a path.
        engine: which engine it is.
        version: its version, empty where it does not say.
        models: every served name of the model, the first is the engine's own.
        adapters: adapters (LoRA) that are served under names of their own.
        sources: event sockets by rank; empty where events are off.
        knows_sources: whether it has an endpoint that tells them at all.
        block_size_tokens: of its events, None where it does not say.
        prefix_caching: whether it reuses prefixes, None where it does not say.
        load: address of the load socket of rank 0, empty for none (SGLang).
        speculation: method of speculative decoding, ``on`` where only that is told; empty for none.
        page: its page of metrics, empty where it was not asked for or has none.
    """

    url: str
    engine: Literal["vllm", "sglang"]
    version: str = ""
    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    sources: tuple[EventSource, ...] = ()
    knows_sources: bool = True
    block_size_tokens: int | None = None
    prefix_caching: bool | None = None
    load: str = ""
    speculation: str = ""
    page: str = ""


def vllm_facts(url: str, *, sources: Any, models: Any, version: Any, metrics: str, info: Any = None) -> EngineFacts:
    """Read the answers of a vLLM server; None stands for an endpoint that it does not have.

    Args:
        url: where it was asked.
        sources: of ``/kv_event_sources``: rank as text -> publisher configuration.
        models: of ``/v1/models``.
        version: of ``/version``.
        metrics: of ``/metrics``, as text.
        info: of ``/server_info`` in JSON, which only its development mode has.
    """
    found = []
    for rank, config in sorted(sources.items(), key=lambda item: str(item[0])) if isinstance(sources, dict) else ():
        if (number := whole(str(rank), RANKS_MAX - 1)) is None or not isinstance(config, dict):
            continue
        if config.get("enable_kv_cache_events") is False or config.get("publisher") in (None, "null"):
            continue
        live, replay = (reachable(str(config.get(name) or ""), url) for name in ("endpoint", "replay_endpoint"))
        if live:
            found.append(EventSource(rank=number, live=live, replay=replay, topic=str(config.get("topic") or "")))
    cache = cache_config(metrics)
    sizes = (whole(cache.get(name, "")) for name in ("hash_block_size", "block_size"))
    return EngineFacts(
        url=url,
        engine="vllm",
        version=_text(version, "version"),
        models=_models(models),
        adapters=_models(models, adapters=True),
        sources=tuple(sorted(found, key=lambda source: source.rank)),
        knows_sources=isinstance(sources, dict),
        block_size_tokens=next((size for size in sizes if size is not None), None),
        prefix_caching={"True": True, "False": False}.get(cache.get("enable_prefix_caching", "")),
        speculation=_method(info) or ("on" if _DRAFTS.search(metrics) else ""),
        page=metrics,
    )


def sglang_facts(url: str, *, info: Mapping[str, Any], models: Any, metrics: str = "") -> EngineFacts:
    """Read the answers of an SGLang server.

    Args:
        url: where it was asked.
        info: of ``/server_info``.
        models: of ``/v1/models``.
        metrics: of ``/metrics``, as text.
    """
    events = info.get("kv_events")
    sources: list[EventSource] = []
    load = ""
    size = info.get("page_size")
    if isinstance(events, dict) and events.get("publisher") not in (None, "null"):
        host = _host(str(events.get("endpoint_host") or ""), url)
        size = events.get("block_size") or size
        sources = _sources(host, events)
        if port := _port(events, "load_endpoint_port_base"):
            load = f"tcp://{host}:{port}"
    cached = info.get("disable_radix_cache")
    return EngineFacts(
        url=url,
        engine="sglang",
        version=_text(info, "version"),
        models=_models(models) or ((_text(info, "served_model_name"),) if _text(info, "served_model_name") else ()),
        sources=tuple(sources),
        knows_sources="kv_events" in info,
        block_size_tokens=size if isinstance(size, int) and size > 0 else None,
        prefix_caching=not cached if isinstance(cached, bool) else None,
        load=load,
        adapters=_models(models, adapters=True),
        speculation=_text(info, "speculative_algorithm"),
        page=metrics,
    )


def _method(info: Any) -> str:
    """Return vLLM's method of speculative decoding; ``on`` where it keeps the last matched block against its rule."""
    config = info.get("vllm_config") if isinstance(info, dict) else None
    speculative = config.get("speculative_config") if isinstance(config, dict) else None
    if not isinstance(speculative, dict):
        return ""
    return "on" if speculative.get("disable_eagle_block_drop") is True else _text(speculative, "method") or "on"


def _sources(host: str, events: Mapping[str, Any]) -> list[EventSource]:
    """Return the ranks' sockets: rank r is at both port bases plus r."""
    base, replay = _port(events, "endpoint_port_base"), _port(events, "replay_endpoint_port_base")
    if not base:
        return []
    ranks = events.get("dp_size")
    count = ranks if isinstance(ranks, int) and 1 <= ranks <= RANKS_MAX else 1
    return [
        EventSource(
            rank=rank,
            live=f"tcp://{host}:{base + rank}",
            replay=f"tcp://{host}:{replay + rank}" if replay else "",
            topic=str(events.get("topic") or ""),
        )
        for rank in range(count)
    ]


def _port(told: Mapping[str, Any], name: str) -> int | None:
    """Return a port that is told as a number; None for what is none, such as true."""
    return port_of(str(told[name])) if isinstance(told.get(name), int) else None


def cache_config(metrics: str) -> dict[str, str]:
    """Return the labels of vLLM's ``cache_config_info`` in a ``/metrics`` text; empty where it is not there."""
    found = _CONFIG.search(metrics)
    return labels_of(found[1]) if found else {}


def labels_of(text: str) -> dict[str, str]:
    """Return the labels between the braces of a metric's line, escapes as they stand."""
    return dict(_LABEL.findall(text))


def reachable(address: str, url: str) -> str:
    """Return an event address as it is reached from where the engine's HTTP address is; empty for one of no use."""
    scheme, separator, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if not separator or scheme != "tcp":
        return address if scheme == "ipc" and separator else ""
    return f"tcp://{_host(host, url)}:{port}" if port_of(port) else ""


def _host(host: str, url: str) -> str:
    own = url.partition("://")[2].partition("/")[0]
    own = own.rpartition(":")[0] if ":" in own.rpartition("]")[2] else own
    if host in _WILDCARDS or (host in _LOOPBACK and own not in _LOOPBACK):
        return own
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _models(answer: Any, *, adapters: bool = False) -> tuple[str, ...]:
    """Return served names: of the model, or of its adapters, which name it as their parent."""
    data = answer.get("data") if isinstance(answer, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    names = [entry.get("id") for entry in entries if bool(entry.get("parent")) is adapters]
    return tuple(name for name in names if isinstance(name, str) and name)


def _text(answer: Any, name: str) -> str:
    value = answer.get(name) if isinstance(answer, Mapping) else None
    return value if isinstance(value, str) else ""
