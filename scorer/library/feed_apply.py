"""Messages of engines into an index.

The order of one commit:

1. resolve the messages into block updates (``engine_blocks`` is a dict per pod),
2. when an epoch rose, the pods' records first: readers must know of it before they see its entries,
3. the updates, into the index,
4. the pods' records,
5. what was learnt into the folder that keeps it, where there is one.

An index that has lost what it had acknowledged (a server that was emptied, or came back with an older state) is
written anew from what is known of the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
from xxhash import xxh3_64_intdigest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.validity import Validity
from kvatlas.scorer.library.backends.base import Backend, Losable
from kvatlas.scorer.library.backends.errors import BackendError, IndexLostError
from kvatlas.scorer.library.restate import restated
from kvatlas.scorer.library.saved_state import FeedState, Kept, KeptView, Lasting, recovered_of
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver
from kvatlas.streams.resolve.sweep import sweep_engine_blocks

log = logging.getLogger(__name__)

_SWEEP_SLICE: Final = 5_000
#: Last messages of a pod by which its stream is known again after a restart.
_DIGESTS: Final = 64
_BACKOFF_SECONDS: Final = (0.05, 0.2, 0.5, 1.0, 2.0)
_CHECK_SECONDS: Final = 1.0


class Applier:
    """What is known of the engines, and the index that follows from it.

    Attributes:
        counts: what was applied, by name, as the workers count it.
        pods: where the pods' records go.
        lock: held by whoever resolves and commits, so that records reach the index in the order of the messages.
        forgotten: called when the index was found to have lost what others than the engines put there.
    """

    def __init__(
        self,
        backend: Backend,
        pods: PodTable,
        *,
        resolve: ResolveOptions,
        clock: Callable[[], int],
        state: FeedState | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backend: the index.
            pods: table of pods that scores are walked with.
            resolve: what events mean.
            clock: wall clock, ns.
            state: where what was learnt is kept; None keeps it in memory alone.
        """
        self.counts: Counter[str] = Counter()
        self.pods = pods
        self.lock = asyncio.Lock()
        self.forgotten: Callable[[], None] = lambda: None
        self._backend = backend
        self._options = resolve
        self._resolver = Resolver(resolve, 1, clock)
        self._state = state
        self._touched: dict[str, None] = {}
        self._digests: dict[str, deque[tuple[int, int]]] = {}
        self._views: dict[str, DictView] = {}
        self._valid: dict[str, Validity] = {}
        self._sweeps: dict[str, None] = {}
        self._to_sweep = asyncio.Event()
        self._reported: set[str] = set()

    async def open(self) -> dict[str, Recovered]:
        """Take over what an earlier run has kept; returns where each pod's stream goes on.

        Raises:
            BackendError: what was kept cannot be opened.
            SettingsError: the index does not last, so that nothing that is kept would go with it.
        """
        if self._state is None:
            return {}
        if not isinstance(self._backend, Lasting):
            raise SettingsError(
                f"state_dir: the {self._backend.name} backend is empty after a restart; use rocksdb or redis"
            )
        views, pods = await self._state.open(self._backend)
        self._views.update(views)
        return {kept.pod: known for kept in pods if (known := self._take_over(kept)) is not None}

    def _take_over(self, kept: Kept) -> Recovered | None:
        """Go on with a pod as it was: it scores at once, as ``stale`` until its engine is heard."""
        known = recovered_of(kept)
        if known is None:
            return None
        self._digests[kept.pod] = deque(kept.digests, _DIGESTS)
        self.pods.put(pod_ids.WRITER_BRIDGE, kept.pod, known.record)
        if kept.streams:
            self.pods.apply(pod_ids.pod_key(pod_ids.WRITER_STREAMS, kept.pod), kept.streams)
        self._valid[kept.pod] = known.record.ended
        if kept.position and isinstance(self._backend, Losable):
            self._backend.positions[pod_ids.pod_ref(kept.pod)] = kept.position
        return known

    def close(self) -> None:
        """Let go of the folder."""
        if self._state is not None:
            self._state.close()

    # --- messages -------------------------------------------------------------------------------------------------

    def effects(self) -> Effects:
        """Return empty effects for one commit."""
        return self._resolver.effects()

    def resolve(self, message: Message, effects: Effects, *, streamed: bool) -> None:
        """Resolve one message; the caller holds :attr:`lock` until the effects are committed.

        Args:
            message: the message.
            effects: gathers what follows from it.
            streamed: a stream of ours read it, which has to be known again after a restart.
        """
        if streamed and self._state is not None and message.sequence >= 0:
            digests = self._digests.setdefault(message.pod, deque(maxlen=_DIGESTS))
            digests.append((message.sequence, xxh3_64_intdigest(message.value)))
        self._resolver.apply(self._view(message.pod), message, effects)

    def _view(self, pod: str) -> DictView:
        view = self._views.get(pod)
        if view is None:
            view = self._views[pod] = DictView() if self._state is None else KeptView(pod)
        if self._state is not None:
            self._touched[pod] = None
        return view

    async def commit(self, effects: Effects) -> None:
        """Bring effects into the index, and tell of them."""
        if effects.urgent:
            self._announce(effects)
        for record in effects.records():
            try:
                await self._patiently(lambda record=record: self._backend.apply(record))  # type: ignore[misc]
            except IndexLostError as error:
                log.warning("%s", error)
                await self.rebuild()  # with this record: its messages are resolved
        self._tell(effects)
        self._keep()
        self.counts.update(effects.counts)
        for name, text in effects.notices:
            log.warning("%s: %s", name, text)

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> None:
        """Call the backend, retrying while it is unavailable."""
        for attempt in itertools.count():
            try:
                await work()
            except BackendError as error:
                if not error.retriable:
                    raise
                pause = _BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)]
                (log.warning if attempt == 0 else log.debug)("%s; trying again every %.2g s", error, pause)
                self.counts["backend_retries"] += 1
                await asyncio.sleep(pause)
            else:
                return

    def _announce(self, effects: Effects) -> None:
        """Tell of risen epochs before their updates are in the index, and not yet of the messages they came with."""
        for pod, record in effects.pods.items():
            before = self.pods.merged.get(pod)
            received = before.receive_ns if before is not None else 0
            self.pods.put(
                pod_ids.WRITER_STREAMS, pod, msgspec.structs.replace(record, last_sequence=-1, receive_ns=received)
            )

    def _tell(self, effects: Effects) -> None:
        for pod, record in effects.pods.items():
            self.pods.put(pod_ids.WRITER_STREAMS, pod, record)
            valid = record.ended
            before = self._valid.get(pod)
            if before != valid:
                self._valid[pod] = valid
                # An index that lasts may have entries of an earlier run, whose epochs this one has never seen.
                if before is not None or isinstance(self._backend, Lasting):
                    self._sweeps[pod] = None
                    self._to_sweep.set()
        for letter in effects.dead:
            # The counts have them all; an engine that goes on sending what cannot be read must not fill the log.
            first = letter.pod not in self._reported
            self._reported.add(letter.pod)
            log.log(logging.WARNING if first else logging.DEBUG, "pod %s: %s; left out", letter.pod, letter.reason)

    def _keep(self) -> None:
        """Write down what was learnt; in memory it is already, so that a crash before this repeats it."""
        if self._state is None or not self._touched:
            return
        touched, self._touched = list(self._touched), {}
        views = (self._views.get(pod) for pod in touched)
        self._state.write([view for view in views if isinstance(view, KeptView)], [self._kept(pod) for pod in touched])

    def _kept(self, pod: str) -> Kept:
        parts = self.pods.parts(pod)
        bridge, streams = parts.get(pod_ids.WRITER_BRIDGE), parts.get(pod_ids.WRITER_STREAMS)
        backend = self._backend
        return Kept(
            pod,
            records.encode(bridge) if bridge is not None else b"",
            records.encode(streams) if streams is not None else b"",
            list(self._digests.get(pod, ())),
            backend.positions.get(pod_ids.pod_ref(pod), b"") if isinstance(backend, Losable) else b"",
        )

    async def forget(self, pod: str) -> int:
        """Forget a pod that has left; returns the epoch that it came to."""
        record = self.pods.merged.get(pod)
        for writer in (pod_ids.WRITER_BRIDGE, pod_ids.WRITER_STREAMS):
            self.pods.apply(pod_ids.pod_key(writer, pod), None)
        view = self._views.pop(pod, None)
        if self._state is not None:
            self._state.drop(pod, view)
        for known in (self._valid, self._digests, self._touched):
            known.pop(pod, None)
        self._reported.discard(pod)
        if record is None:
            return 0
        with contextlib.suppress(BackendError):  # only room is lost: nobody reads entries of an ended epoch
            await self._backend.drop_epoch(pod_ids.pod_ref(pod), record.epoch)
        return record.epoch

    # --- an index that forgot -------------------------------------------------------------------------------------

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run beside the messages, for ever."""
        backend = self._backend
        return [self._sweep(), *([self._watch(backend)] if isinstance(backend, Losable) else [])]

    async def _watch(self, backend: Losable) -> None:
        """Look from time to time whether the index still has everything: also when no message comes to show it."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                await backend.check()
            except IndexLostError as error:
                log.warning("%s", error)
                await self.recover()
            except BackendError as error:
                log.debug("%s", error)  # applying and scoring say so

    async def recover(self) -> None:
        """Bring an index that has lost what it had to what is known; no effect on one that is whole."""
        async with self.lock:
            await self.rebuild()

    async def rebuild(self) -> None:
        """The same for who holds :attr:`lock`."""
        backend = self._backend
        if not isinstance(backend, Losable) or not backend.lost:
            return
        while True:
            try:
                await self._patiently(backend.begin_anew)
                self.forgotten()
                for pod, view in list(self._views.items()):
                    for record in restated(pod, view, self._options):
                        await self._patiently(lambda record=record: self._backend.apply(record))  # type: ignore[misc]
            except IndexLostError as error:
                log.warning("%s", error)
            else:
                break
        backend.whole()
        self.counts["index_rebuilt"] += 1
        log.warning("the index was written anew from what is known of %d pods", len(self._views))

    # --- what is dead ---------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Give back the room of ended epochs, for ever; nothing reads it in any case."""
        while True:
            await self._to_sweep.wait()
            self._to_sweep.clear()
            pods, self._sweeps = list(self._sweeps), {}
            valid = {pod_ids.pod_ref(pod): self._valid[pod] for pod in pods if pod in self._valid}
            for pod in pods:
                await self._sweep_view(pod, valid)
            try:
                self.counts["holders_swept"] += await self._backend.drop_epochs(valid)
            except BackendError as error:
                log.warning("sweep of %s: %s", ", ".join(pods), error)

    async def _sweep_view(self, pod: str, valid: dict[int, Validity]) -> None:
        view = self._views.get(pod)
        if view is None:
            return
        keys = list(view.values)
        for start in range(0, len(keys), _SWEEP_SLICE):
            part = keys[start : start + _SWEEP_SLICE]
            found = sweep_engine_blocks(
                ((key, value) for key in part if (value := view.values.get(key)) is not None), valid
            )
            for key, value in found.puts.items():
                view.put(key, value)
            for key in found.deletes:
                view.delete(key)
            await asyncio.sleep(0)
