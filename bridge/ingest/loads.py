"""Loads of the pods that are heard: read off their engines' pages and load sockets, told in the pods' records.

Where an endpoint does not say where its load is read, a pod id that is a serving address does.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Final

from kvatlas.bridge.engines.engine_metrics import EngineLoad, read_stat
from kvatlas.bridge.engines.scraper import LoadPage, Scraper
from kvatlas.bridge.engines.subscriber import Subscriber
from kvatlas.bridge.errors import EngineError
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.streams import RECORD_SECONDS, EngineStreams
from kvatlas.bridge.model.pod_ids import serving_address

log = logging.getLogger(__name__)

_SOCKET: Final = "socket"


class EngineLoads:
    """The loads of a process's endpoints.

    Attributes:
        reads: what came of reads of pages (``ok``, ``empty``, ``failed``) and messages of sockets (``socket``).
    """

    def __init__(self, streams: EngineStreams) -> None:
        """Open nothing yet."""
        self.reads: Counter[str] = Counter()
        self._streams = streams
        self._now_ns = streams.shared.now_ns
        self._sockets: dict[tuple[str, str], Subscriber] = {}  # by load socket and endpoint
        self._refused: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Read until cancelled, as often as records are written."""
        scraper = Scraper(
            self._look,
            lambda key, load, asked: self._told(key, load, int(asked * 1e9)),
            lambda result: self.reads.update((result,)),
            every_seconds=RECORD_SECONDS,
            clock=lambda: self._now_ns() / 1e9,
        )
        try:
            await scraper.run()
        finally:
            for socket in self._sockets.values():
                socket.close()

    def _look(self) -> Iterator[LoadPage]:
        """Follow the endpoints: open and close load sockets, and return the pages to read."""
        endpoints = self._streams.endpoints.items()
        ours = {key: one for key, one in endpoints if one.session is not None and not one.leaving}
        wanted = {(one.spec.load, key) for key, one in ours.items() if one.spec.load}
        for socket in self._sockets.keys() - wanted:
            self._sockets.pop(socket).close()
        self._refused &= wanted
        for address, key in wanted - self._sockets.keys() - self._refused:
            self._hear(address, key)
        for key, one in ours.items():
            if not one.spec.load and (url := _page_of(one)):
                yield LoadPage(key, url, one.spec.rank if one.spec.ranks > 1 else None)

    def _hear(self, address: str, key: str) -> None:
        def received(frames: list[bytes]) -> None:
            if (load := read_stat(frames)) is not None:
                self.reads[_SOCKET] += 1
                self._told(key, load, self._now_ns())

        try:
            self._sockets[address, key] = Subscriber(self._streams.wires.context, address, received)
        except EngineError as error:
            self._refused.add((address, key))
            log.error("%s: no load is read there", error)

    def _told(self, key: str, load: EngineLoad, read_ns: int) -> None:
        endpoint = self._streams.endpoints.get(key)
        if endpoint is not None and endpoint.session is not None:
            endpoint.session.report(load.named(), read_ns)


def _page_of(endpoint: EngineEndpoint) -> str:
    if endpoint.spec.metrics:
        return endpoint.spec.metrics
    address = serving_address(endpoint.pod)
    return f"http://{address}/metrics" if address else ""
