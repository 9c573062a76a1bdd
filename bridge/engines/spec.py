"""Endpoint specs: where an engine publishes, and what is known of it beforehand."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters import ADAPTERS
from kvatlas.bridge.model.numbers import RANKS_MAX, port_of, whole

#: Speculative decoding by which vLLM computes the last block that it matched again, beside all that ends in ``mtp``.
_DROPPING: Final = ("eagle", "eagle3", "dflash", "dspark")
#: What an engine's announcements mean, see ``announcements`` of :class:`EngineSpec`.
ANNOUNCEMENTS: Final = ("auto", "copies", "presence")
_CHUNK_MAX: Final = 65_536


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One engine endpoint: one data-parallel rank, hence one ordered stream.

    Attributes:
        live: ZMQ address of the PUB socket; empty for engines that connect to us.
        replay: ZMQ address of the ROUTER socket, empty when there is none.
        pod: pod name when the engine's topic does not say; empty for host:port.
        model: model name when the topic does not say.
        engine: adapter that reads its payloads.
        rank: data-parallel rank by position, 0 for single-rank engines.
        ranks: ranks of the engine.
        store: shared store that the pod mounts.
        bound: whether the engine connected to us (``live`` is then a name, not an address).
        metrics: address of its metrics page, http://HOST:PORT/PATH, empty for none.
        load: ZMQ address of its load socket, empty for none (SGLang).
        announcements: ``copies``, ``presence`` or ``auto``: whether every copy of a block is announced and removed on
            its own; empty for the deployment's default.
        blocks_per_chunk: engine blocks that its offload tier stores and loads as one, for engines whose events name a
            chunk by one key without saying so; 0 where the events say it.
        speculation: the engine's method of speculative decoding, ``method`` of vLLM's ``--speculative-config``; empty
            for none.
    """

    live: str
    replay: str = ""
    pod: str = ""
    model: str = ""
    engine: str = "vllm"
    rank: int = 0
    ranks: int = 1
    store: str = ""
    announcements: str = ""
    blocks_per_chunk: int = 0
    speculation: str = ""
    bound: bool = False
    metrics: str = ""
    load: str = ""

    def replace(self, **changes: Any) -> EngineSpec:
        """Return a copy with other values."""
        return msgspec.structs.replace(self, **changes)

    @property
    def key(self) -> str:
        """What tells endpoints apart."""
        return self.live

    def headers(self) -> topics.Headers:
        """Return the headers that tell readers of the pod's messages what only its endpoint's options say."""
        told = {
            topics.H_STORE: self.store,
            topics.H_ANNOUNCEMENTS: self.announcements,
            topics.H_BLOCKS_PER_CHUNK: str(self.blocks_per_chunk) if self.blocks_per_chunk else "",
            topics.H_COMPUTES_AGAIN: "1" if computes_again(self.engine, self.speculation) else "",
        }
        return [(name, value.encode()) for name, value in told.items() if value]

    @property
    def fallback_pod(self) -> str:
        """Pod name when neither topic nor spec says one: the address without its scheme."""
        return self.pod or self.live.partition("://")[2]


def computes_again(engine: str, method: str) -> bool:
    """Tell whether an engine computes the last block that it matched again, for what its drafts are made from.

    SGLang says in its events what speculation changes.
    """
    return engine == "vllm" and (method.lower() in _DROPPING or method.lower().endswith("mtp"))


def parse_engine(text: str) -> list[EngineSpec]:
    """Read ``tcp://HOST:PORT[,tcp://HOST:REPLAY][,pod=NAME][,model=NAME][,engine=NAME][,dp=N][,store=NAME]...``.

    Returns:
        One spec per data-parallel rank; rank ``r`` listens on both ports plus ``r``, as vLLM does it.

    Raises:
        SettingsError: the text is no such spec; says which part.
    """
    addresses, options = split_spec(text, _OPTIONS)
    if not 1 <= len(addresses) <= 2:
        raise SettingsError(f"engine {text!r}: expected one or two addresses, live and replay; found {len(addresses)}")
    return engine_specs(text, addresses[0], addresses[1] if len(addresses) > 1 else "", options)


def parse_bind(text: str) -> tuple[EngineSpec, int]:
    """Read ``tcp://HOST_OR_*:PORT[,replay_port=PORT][,model=NAME][,engine=NAME][,store=NAME][,announcements=...]``.

    Returns:
        What holds for every engine that connects (``live`` is the address to bind), and the port of their replay
        sockets, 0 for none.

    Raises:
        SettingsError: the text is no such address; says which part.
    """
    addresses, options = split_spec(text, _BIND_OPTIONS)
    if len(addresses) != 1:
        raise SettingsError(f"bind {text!r}: expected one address; found {len(addresses)}")
    scheme, _, rest = addresses[0].partition("://")
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and not (host and (port == "*" or port_of(port) is not None)):
        raise SettingsError(f"bind {text!r}: expected tcp://*:PORT or tcp://HOST:PORT to bind")
    replay_port = port_of(options.pop("replay_port", "0"))
    if scheme not in ("tcp", "ipc") or replay_port is None:
        raise SettingsError(f"bind {text!r}: expected tcp:// or ipc://, and replay_port a port")
    common = engine_specs(text, "tcp://bound:1", "", options)[0]
    return msgspec.structs.replace(common, live=addresses[0], bound=True), replay_port


def split_spec(text: str, names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Split a spec into its addresses and its ``name=value`` parts."""
    addresses: list[str] = []
    options: dict[str, str] = {}
    for raw in text.split(","):
        part = raw.strip()
        name, equals, value = part.partition("=")
        if "://" in part and not (equals and name.isidentifier()):
            addresses.append(part)
        elif equals and name in names:
            options[name] = value
        else:
            raise SettingsError(f"engine {text!r}: {part!r} is neither an address nor one of {', '.join(names)}=")
    return addresses, options


#: What holds for an engine whichever way it is found.
_COMMON: Final = ("model", "store", "announcements", "blocks_per_chunk", "speculation")
HTTP_OPTIONS: Final = ("pod", *_COMMON)
_BIND_OPTIONS: Final = ("engine", "replay_port", *_COMMON)
_OPTIONS: Final = ("pod", "engine", "dp", "metrics", "load", *_COMMON)


def engine_specs(where: str, live: str, replay: str, options: dict[str, str]) -> list[EngineSpec]:
    """Build the specs of one engine, one per rank.

    Args:
        where: named in errors.
        live: address of rank 0's PUB socket.
        replay: address of rank 0's ROUTER socket, empty for none.
        options: the ``name=value`` parts of a spec.

    Raises:
        SettingsError: an address or an option is not valid.
    """
    engine = options.get("engine", "vllm")
    if engine not in ADAPTERS:
        raise SettingsError(f"engine {where!r}: engine={engine!r}; known engines: {', '.join(sorted(ADAPTERS))}")
    announcements = options.get("announcements", "")
    if announcements and announcements not in ANNOUNCEMENTS:
        known = ", ".join(ANNOUNCEMENTS)
        raise SettingsError(f"engine {where!r}: announcements={announcements!r}; expected one of {known}")
    chunk = whole(options.get("blocks_per_chunk", "0"), _CHUNK_MAX)
    if chunk is None:
        raise SettingsError(
            f"engine {where!r}: blocks_per_chunk={options['blocks_per_chunk']!r}; expected the engine blocks in a "
            f"chunk of its offload tier, up to {_CHUNK_MAX}"
        )
    ranks = whole(options.get("dp", "1"), RANKS_MAX)
    if not ranks:
        raise SettingsError(f"engine {where!r}: dp={options['dp']!r}; expected the number of ranks, 1 to {RANKS_MAX}")
    metrics, load = options.get("metrics", ""), options.get("load", "")
    if metrics and not metrics.startswith(("http://", "https://")):
        raise SettingsError(
            f"engine {where!r}: metrics={metrics!r}; expected the address of a page, http://HOST:PORT/metrics"
        )
    for address in filter(None, (live, replay, load)):
        _check_address(where, address)
        _check_address(where, offset(address, ranks - 1))
    lives, replays = ({offset(address, rank) for rank in range(ranks)} for address in (live, replay))
    if replay and lives & replays:
        raise SettingsError(
            f"engine {where!r}: with {ranks} rank(s) {min(lives & replays)} is a live and a replay address; rank r is "
            "at both ports plus r, so put them further apart"
        )
    return [
        EngineSpec(
            live=offset(live, rank),
            replay=offset(replay, rank) if replay else "",
            pod=options.get("pod", ""),
            model=options.get("model", ""),
            engine=engine,
            rank=rank,
            ranks=ranks,
            store=options.get("store", ""),
            announcements=announcements,
            blocks_per_chunk=chunk,
            speculation=options.get("speculation", ""),
            metrics=metrics,
            load=offset(load, rank) if load else "",
        )
        for rank in range(ranks)
    ]


def _check_address(where: str, address: str) -> None:
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("tcp", "ipc", "inproc") or not rest:
        raise SettingsError(f"engine {where!r}: address {address!r}; expected tcp://HOST:PORT or ipc://PATH")
    if scheme == "tcp":
        host, colon, port = rest.rpartition(":")
        if ":" in host and not host.startswith("["):
            raise SettingsError(
                f"engine {where!r}: address {address!r}; an IPv6 address stands in brackets: tcp://[{host}]:{port}"
            )
        if not colon or not host or "*" in host or not port_of(port):
            raise SettingsError(f"engine {where!r}: address {address!r}; expected tcp://HOST:PORT to connect to")


def offset(address: str, rank: int) -> str:
    """Return the address of a rank, of rank 0's: the port plus the rank."""
    if rank == 0:
        return address
    if address.startswith("tcp://"):
        head, _, port = address.rpartition(":")
        return f"{head}:{int(port) + rank}"
    return f"{address}_dp{rank}"  # vLLM's rule for sockets without ports
