"""Pod directory: the pods as ``kv-pods`` tells them, both writers' records merged. Pure; workers and scorers follow it.

A record of a lower epoch than the one that is known is late, of a former owner of the pod or partition: epochs only
grow, and neither a sweep nor a score may see bounds go back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.epochs import incarnation_of
from kvatlas.bridge.model.pod_ids import WRITER_BRIDGE, WRITER_STREAMS, pod_ref, streams_writer
from kvatlas.bridge.model.records import GONE, PodRecord, decode
from kvatlas.bridge.model.topics import BASE_VERSION
from kvatlas.bridge.model.validity import Validity

log = logging.getLogger(__name__)


def merge_pod(bridge: PodRecord | None, streams: PodRecord | None) -> PodRecord:
    """Join what both writers know: epochs as the highest, meaning from streams, liveness from the bridge."""
    if bridge is None or streams is None:
        known = bridge or streams
        assert known is not None
        return known
    return msgspec.structs.replace(
        streams,
        state=bridge.state,
        epoch=max(bridge.epoch, streams.epoch),
        valid_from=max(bridge.valid_from, streams.valid_from),
        gpu_valid_from=max(bridge.gpu_valid_from, streams.gpu_valid_from),
        suspect_before=max(bridge.suspect_before, streams.suspect_before),
        model=streams.model or bridge.model,
        engine=streams.engine or bridge.engine,
        endpoint=bridge.endpoint or streams.endpoint,
        first_lost=bridge.first_lost,
        last_lost=bridge.last_lost,
        lost=max(bridge.lost, streams.lost),
        heard_from=bridge.heard_from,
        serves=bridge.serves,
        store=bridge.store or streams.store,
        load=bridge.load,
        load_ns=bridge.load_ns,
    )


class PodDirectory:
    """All pods known, by pod id, as one index version tells what their events mean.

    Attributes:
        merged: pod id -> both writers' records merged.
        clashes: pod ids whose 64-bit reference another pod had first: what is stored under it may be either's.
        rejected: records that could not be read.
        on_changed: told of every change: pod id, merged record before and after, None where there is none.
    """

    def __init__(self, index_version: str = BASE_VERSION) -> None:
        """Start empty; resolve agents of other index versions are passed over."""
        self.merged: dict[str, PodRecord] = {}
        self.clashes: set[str] = set()
        self.rejected = 0
        self.on_changed: Callable[[str, PodRecord | None, PodRecord | None], None] | None = None
        self._streams = streams_writer(index_version)
        self._parts: dict[str, dict[str, PodRecord]] = {}
        self._names: dict[int, str] = {}

    # --- records in ------------------------------------------------------------------------------------------------

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Apply one ``kv-pods`` record; one that cannot be read is counted and left out."""
        writer, _, name = (key or b"").decode("utf-8", "replace").partition("|")
        if writer.partition(".")[0] not in (WRITER_BRIDGE, WRITER_STREAMS) or not name:
            self._reject(f"kv-pods: key {key!r} is not <writer>|<pod id>")
            return
        if writer == self._streams:
            writer = WRITER_STREAMS
        elif writer != WRITER_BRIDGE:
            return  # of another index version
        if not value:
            self.remove(writer, name)
            return
        try:
            record = decode(PodRecord, value)
        except WireError as error:
            self._reject(f"kv-pods: record of {name}: {error}")
            return
        self.put(writer, name, record)

    def put(self, writer: str, name: str, record: PodRecord) -> None:
        """Apply one writer's record of a pod."""
        known = self._names.setdefault(pod_ref(name), name)
        if known != name and name not in self.clashes:
            self.clashes.add(name)
            log.error("pod %s has the same 64-bit reference as pod %s and is not scored: rename it", name, known)
        parts = self._parts.setdefault(name, {})
        if (old := parts.get(writer)) is not None and record.epoch < old.epoch:
            return
        parts[writer] = record
        self._merge(name, parts)

    def remove(self, writer: str, name: str) -> None:
        """Forget one writer's record of a pod; the pod goes with the last one."""
        parts = self._parts.get(name)
        if parts is None or parts.pop(writer, None) is None:
            return
        if parts:
            self._merge(name, parts)
            return
        before = self.merged.pop(name)
        del self._parts[name]
        self.clashes.discard(name)
        if self._names.get(pod_ref(name)) == name:
            del self._names[pod_ref(name)]
        self._tell(name, before, None)

    def read_version(self, index_version: str) -> None:
        """Take the records of another index version, from their beginning; those of the one before are forgotten."""
        self._streams = streams_writer(index_version)
        for name, parts in list(self._parts.items()):
            record = parts.get(WRITER_STREAMS)
            if record is not None and not record.approximate:  # a prediction is the reader's own
                self.remove(WRITER_STREAMS, name)

    def _merge(self, name: str, parts: Mapping[str, PodRecord]) -> None:
        before = self.merged.get(name)
        after = self.merged[name] = merge_pod(parts.get(WRITER_BRIDGE), parts.get(WRITER_STREAMS))
        self._tell(name, before, after)

    def _tell(self, name: str, before: PodRecord | None, after: PodRecord | None) -> None:
        if self.on_changed is not None:
            self.on_changed(name, before, after)

    def _reject(self, text: str) -> None:
        self.rejected += 1
        log.warning("%s", text)

    # --- what is known ---------------------------------------------------------------------------------------------

    def parts(self, name: str) -> Mapping[str, PodRecord]:
        """Return each writer's record of a pod; empty for one that is not known."""
        return self._parts.get(name, {})

    def records(self) -> list[PodRecord]:
        """Return all pods' merged records, by name."""
        return [record for _, record in sorted(self.merged.items())]

    def names(self) -> dict[int, str]:
        """Return pod ref -> pod id."""
        return dict(self._names)

    def ended(self) -> dict[int, Validity]:
        """Return pod ref -> which entries have not ended, for the sweep."""
        return {ref: self.merged[name].ended for ref, name in self._names.items()}

    def gone_since(self, before_ns: int) -> dict[int, int]:
        """Return pod ref -> incarnation, of pods that were gone before a time (ns since the epoch) and are since.

        Only pods that the bridge still has a record of: it keeps what is late of them from coming back to life.
        """
        found = {}
        for ref, name in self._names.items():
            bridge, pod = self._parts[name].get(WRITER_BRIDGE), self.merged[name]
            if bridge is None or bridge.state != GONE or bridge.updated_ns >= before_ns:
                continue
            if max(pod.updated_ns, pod.receive_ns) < before_ns:
                found[ref] = incarnation_of(pod.epoch)
        return found
