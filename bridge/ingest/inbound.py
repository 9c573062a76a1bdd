"""Bind mode: engines connect to us. One socket hears many pods; topic and data-parallel rank tell them apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import msgspec

from kvatlas.bridge.engines.identity import parse_topic
from kvatlas.bridge.engines.spec import EngineSpec, parse_bind
from kvatlas.bridge.engines.subscriber import Subscriber
from kvatlas.bridge.engines.wires import Wires
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.model.adapters.fields import peek_rank

log = logging.getLogger(__name__)


#: Topic, data-parallel rank, and the peer's address where the topic names no pod.
_Place = tuple[bytes, int, str]


class _Peer:
    """A pod that connected: its endpoint, its connection (None when closed), and when that was noticed."""

    __slots__ = ("connection", "endpoint", "left_seconds")

    def __init__(self, endpoint: EngineEndpoint) -> None:
        self.endpoint = endpoint
        self.connection: int | None = None
        self.left_seconds: float | None = None


#: Pods that may connect at most: their ids are their own word, so their number must be bounded.
BIND_PODS: Final = 10_000


class Inbound:
    """One bound socket; makes an endpoint for each (topic, rank) it hears.

    A topic ``kv@pod@model`` names the pod; under any other topic the pod is named by the address it connects from. A
    pod is one connection's: what another one says under the same name is left out until the first is closed, so two
    engines never become one pod.
    """

    def __init__(
        self, text: str, shared: Shared, wires: Wires, open_endpoint: Callable[[EngineSpec], EngineEndpoint]
    ) -> None:
        """Bind.

        Args:
            text: the address and what holds for its engines, see :func:`~kvatlas.bridge.options.parse_bind`.
            shared: what all sessions use.
            wires: opens the socket.
            open_endpoint: begins an endpoint of a pod that connected.

        Raises:
            SettingsError: the text is not valid.
            EngineError: the address cannot be bound.
        """
        self._common, self._replay_port = parse_bind(text)
        self._shared = shared
        self._open = open_endpoint
        self._ours: dict[_Place, _Peer] = {}
        self._connections: set[int] = set()
        self._refused: set[tuple[int, _Place]] = set()
        self._socket = Subscriber(wires.context, self._common.live, self._received, connection=self._connected)
        self.address = self._socket.address

    def close(self) -> None:
        """Stop hearing; the endpoints are closed by who holds them."""
        self._socket.close()

    def _received(self, frames: list[bytes]) -> None:
        topic = frames[0]
        rank = peek_rank(frames[-1]) or 0
        named = parse_topic(topic) is not None
        # A pod with a name keeps it wherever it connects from; one without is told by its address.
        place = (topic, rank, "" if named else self._socket.peer)
        peer = self._ours.get(place)
        if peer is None:
            if len(frames) != 3 or len(frames[1]) != 8 or len(self._ours) >= BIND_PODS:
                reason = "too many pods" if len(self._ours) >= BIND_PODS else "not a message"
                address = self._socket.peer
                self._shared.dead_letter(address or self.address, frames, f"{reason}: from {address}", self.address)
                return
            peer = self._ours[place] = _Peer(self._open(self._spec(topic, rank, named=named)))
            log.info("%s: %s connected from %s", self.address, peer.endpoint.spec.live, self._socket.peer)
        if peer.connection == self._socket.number or self._take(place, peer):
            peer.endpoint.received(frames)

    def _take(self, place: _Place, peer: _Peer) -> bool:
        """Tell whether the connection that is being read may speak for a pod; it is the pod's from then on."""
        number = self._socket.number
        if number not in self._connections:
            return peer.connection is None  # the last words of one that is closed
        if peer.connection is not None:
            if (number, place) not in self._refused:
                self._refused.add((number, place))
                self._shared.conflicts += 1
                log.error(
                    "%s: two engines from %s are both pod %s, the second is left out. Give each a topic kv@pod@model",
                    *(self.address, self._socket.peer, peer.endpoint.pod),
                )
            return False
        peer.connection = number
        again, peer.left_seconds, peer.endpoint.leaving = peer.endpoint.leaving, None, False
        if (number, place) in self._refused:
            self._refused.discard((number, place))
            peer.endpoint.replaced()  # the two were there at one time, so they are not one engine
        elif again:
            peer.endpoint.reconnected()
        return True

    def left(self, now_seconds: float, limit_seconds: float) -> list[EngineEndpoint]:
        """Forget the pods whose connection was closed that long ago; returns their endpoints, to be ended.

        Args:
            now_seconds: a monotonic clock.
            limit_seconds: how long a pod may take to connect again.
        """
        gone = []
        for place, peer in list(self._ours.items()):
            if peer.connection is None and peer.left_seconds is None:
                peer.left_seconds = now_seconds
            if peer.left_seconds is not None and now_seconds - peer.left_seconds >= limit_seconds:
                gone.append(self._ours.pop(place).endpoint)
        return gone

    def _spec(self, topic: bytes, rank: int, *, named: bool) -> EngineSpec:
        peer = self._socket.peer
        host = f"[{peer}]" if ":" in peer else peer
        port = self._replay_port + rank
        return msgspec.structs.replace(
            self._common,
            live=f"{self.address}/{topic.decode(errors='replace') if named else peer}/{rank}",
            replay=f"tcp://{host}:{port}" if self._replay_port and peer else "",
            pod="" if named else peer or "unnamed",
            rank=rank,
        )

    def _connected(self, number: int, there: bool) -> None:
        if there:
            self._connections.add(number)
            return
        self._connections.discard(number)
        self._refused = {item for item in self._refused if item[0] != number}
        for peer in self._ours.values():
            if peer.connection == number:
                peer.connection = None
                peer.endpoint.leaving = True
