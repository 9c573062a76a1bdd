"""Bind mode: engines connect to us. One socket hears many pods; topic and data-parallel rank tell them apart."""

from __future__ import annotations

import logging

import msgspec

from kvatlas.bridge.adapters.fields import peek_rank
from kvatlas.bridge.identity import parse_topic
from kvatlas.bridge.options import EngineSpec, parse_bind
from kvatlas.bridge.stream import PodStream, Shared, open_socket

log = logging.getLogger(__name__)


class Inbound:
    """One bound socket; makes a stream for each (topic, rank) it hears.

    A topic ``kv@pod@model`` names the pod; under any other topic the pod is named by the address it connects from.
    """

    def __init__(self, text: str, shared: Shared, streams: dict[str, PodStream]) -> None:
        """Bind.

        Args:
            text: the address and what holds for its engines, see :func:`~kvatlas.bridge.options.parse_bind`.
            shared: what all streams use.
            streams: all streams by key; new ones are put there.

        Raises:
            SettingsError: the text is not valid.
            EngineError: the address cannot be bound.
        """
        self._common, self._replay_port = parse_bind(text)
        self._shared = shared
        self._streams = streams
        self._ours: dict[tuple[bytes, int, str], PodStream] = {}
        self._socket = open_socket(shared, self._common.live, self._received, self._connected, bind=True)
        self.address = self._socket.address

    def close(self) -> None:
        """Stop hearing; the streams are closed by who holds them."""
        self._socket.close()

    def _received(self, frames: list[bytes]) -> None:
        topic = frames[0]
        rank = peek_rank(frames[-1]) or 0
        named = parse_topic(topic) is not None
        # A pod with a name keeps it wherever it connects from; one without is told by its address.
        place = (topic, rank, "" if named else self._socket.peer)
        stream = self._ours.get(place)
        if stream is None:
            if len(frames) != 3 or len(frames[1]) != 8 or len(self._ours) >= self._shared.settings.bind_pods:
                reason = "too many pods" if len(self._ours) >= self._shared.settings.bind_pods else "not a message"
                peer = self._socket.peer
                self._shared.dead_letter(peer or self.address, frames, f"{reason}: from {peer}", self.address)
                return
            stream = self._ours[place] = PodStream(self._spec(topic, rank, named=named), self._shared)
            self._streams[stream.spec.key] = stream
            log.info("%s: %s connected from %s", self.address, stream.spec.live, self._socket.peer)
        stream.received(frames)

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

    def _connected(self) -> None:
        for stream in self._ours.values():
            stream.reconnected()
