"""Values of our records on Kafka, each defined once, here.

Every value but the engine's own message is msgpack with the schema version first (``"v"`` in a map). A reader that
meets a version it does not know raises :class:`VersionError`; the caller dead-letters that record and goes on.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, VersionError, WireError
from kvatlas.bridge.model.numbers import (
    Byte,
    ByVersion,
    Count,
    Epoch,
    Incarnation,
    Nanoseconds,
    Partition,
    Sequence,
    Short,
    Tokens,
    VersionName,
    Word,
)
from kvatlas.bridge.model.topics import BASE_VERSION
from kvatlas.bridge.model.validity import Validity

SCHEMA_VERSION: Final = 1


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What the bridge learnt about a pod's stream, written into ``kv-events`` in order with its messages.

    Attributes:
        type: ``start`` (first contact), ``gap`` (``first_lost`` to ``last_lost`` are gone for good), ``restart`` (a
            new engine process; nothing stored before is there), ``gone`` (the pod was removed).
        incarnation: the incarnation that holds from here on.
        first_lost: first sequence of a gap.
        last_lost: last sequence of a gap, inclusive; -1 when unknown.
        reason: shown in logs.
    """

    v: int = SCHEMA_VERSION
    type: str
    incarnation: Incarnation
    first_lost: Sequence = -1
    last_lost: Sequence = -1
    reason: str = ""


class GroupSpec(msgspec.Struct, frozen=True, array_like=True):
    """One KV-cache group of a pod: attention kind (:class:`~kvatlas.bridge.model.events.Kind`), window, block size."""

    kind: Byte = 0
    window_tokens: Word = 0
    block_size_tokens: Tokens = 0


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one writer knows of a pod. ``kv-pods`` holds two records a pod, see :func:`pod_key`.

    Which index entries of the pod count is said by :attr:`validity`.

    Attributes:
        writer: ``bridge`` (liveness and position in the engine's stream) or ``streams`` (what its events mean).
        state: ``live``, ``stale`` (silent past the limit) or ``gone``.
        epoch: epoch of what is written now.
        valid_from: entries of older epochs do not exist.
        gpu_valid_from: the same for the GPU tier alone, when clears are narrowed to it.
        suspect_before: entries of older epochs may be gone: a message was lost since.
        block_size_tokens: engine block size of group 0; 0 until known.
        last_sequence: last sequence on the log (bridge) or applied (streams); -1 before the first.
        last_event_ns: the engine's clock in its last batch, ns since the epoch.
        receive_ns: when the bridge received that message, its wall clock in ns.
        first_lost, last_lost: the newest gap that could not be repaired.
        lost: messages lost for good since the pod is known.
        groups: KV-cache groups by index.
        store: shared store that the pod mounts, empty for none.
        pairs: the engine's cache is keyed by pairs of tokens: a block counts only with the token behind it.
        named: salts, pictures or embeddings are in use, so blocks named by their tokens alone count nothing.
        chunk_tokens: tokens that the pod's offload tiers load as one; 0 for blocks as they are.
        events_partition, events_offset: position in ``kv-events`` that this record reflects.
        load: what the pod reports of itself (:mod:`kvatlas.bridge.model.loads`); read off it at ``load_ns``.
        updated_ns: the writer's wall clock in ns.
        adapters: adapters (LoRA) that the pod's events have named.
        computes_again: the engine computes the last block that it matched again (vLLM with EAGLE or MTP).
        serves: of a cache server: the pods that load from it, each with all its ranks.
        heard_from: first sequence from which on nothing of the engine's stream is missing; -1 where nobody says.
    """

    v: int = SCHEMA_VERSION
    pod: str
    writer: str
    state: str = "live"
    epoch: Epoch = 0
    valid_from: Epoch = 0
    gpu_valid_from: Epoch = 0
    suspect_before: Epoch = 0
    model: str = ""
    engine: str = ""
    endpoint: str = ""
    block_size_tokens: Tokens = 0
    dp_rank: Tokens = 0
    last_sequence: Sequence = -1
    last_event_ns: Nanoseconds = 0
    receive_ns: Nanoseconds = 0
    first_lost: Sequence = -1
    last_lost: Sequence = -1
    lost: Count = 0
    groups: dict[Short, GroupSpec] = {}
    store: str = ""
    approximate: bool = False
    pairs: bool = False
    named: bool = False
    chunk_tokens: Tokens = 0
    events_partition: Partition = -1
    events_offset: Sequence = -1
    load: dict[str, float] = {}
    load_ns: Nanoseconds = 0
    updated_ns: Nanoseconds = 0
    adapters: list[str] = []
    computes_again: bool = False
    heard_from: Sequence = -1
    serves: list[str] = []

    @property
    def coverage(self) -> str:
        """How much of the engine's life is on the log: ``whole``, ``partial`` (what came before is not), or empty.

        An engine that ran before it was heard is covered as far as its replay buffer reaches back; nothing is known of
        one that has said nothing yet.
        """
        if self.heard_from < 0 or self.last_sequence < 0:
            return ""
        return PARTIAL if self.heard_from else WHOLE

    @property
    def validity(self) -> Validity:
        """Which of the pod's index entries count."""
        return Validity(self.valid_from, self.gpu_valid_from, self.suspect_before, self.state == GONE)

    @property
    def ended(self) -> Validity:
        """Which entries may be removed for good: ended epochs alone, since a record that says gone can be late."""
        return Validity(self.valid_from, self.gpu_valid_from)


LIVE: Final = "live"
STALE: Final = "stale"
GONE: Final = "gone"

WHOLE: Final = "whole"
PARTIAL: Final = "partial"


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker answers lookups and for which ``kv-blocks`` partitions. A tombstone says it left.

    Attributes:
        worker: worker id, stable over restarts of the same state folder.
        endpoint: host:port of its ``BlockIndex`` service.
        partitions: active and caught up, safe to ask.
        standby: held as standby; answers are flagged.
        restoring: owned but not caught up; not asked.
        partition_count: partitions of ``kv-blocks``; readers and workers must agree.
        block_size_tokens: canonical block size of the deployment.
        key_version: version of the block key.
        generation: Kafka group generation of the assignment.
        offsets: partition -> offset of ``kv-blocks`` applied last.
        updated_ns: the worker's wall clock in ns.
        expires_ns: past this time the record is stale (the worker renews it).
        index_version: the index version that it keeps.
        blocks: pod, or ``store:NAME``, -> tier -> blocks in its active partitions, as counted last; from a sample
            where there are many. Nothing before the first count.
    """

    v: int = SCHEMA_VERSION
    worker: str
    endpoint: str
    partitions: list[Partition] = []
    standby: list[Partition] = []
    restoring: list[Partition] = []
    partition_count: Partition = 0
    block_size_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)] = 16
    key_version: Count = 1
    generation: Sequence = 0
    offsets: dict[Partition, Sequence] = {}
    updated_ns: Nanoseconds = 0
    expires_ns: Nanoseconds = 0
    index_version: str = BASE_VERSION
    blocks: dict[str, dict[str, Count]] = {}


#: Key of the catalog on ``kv-workers``; no worker id begins so.
CATALOG_KEY: Final = b"|index-versions"


class IndexVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One build of the index.

    Attributes:
        block_size_tokens: its canonical block size; 0 for the base version, whose workers say it.
        partitions: of its ``kv-blocks`` topic; 0 for the base version.
        created_ns: when it was begun, wall clock in ns.
    """

    block_size_tokens: Tokens = 0
    partitions: Partition = 0
    created_ns: Nanoseconds = 0


class IndexCatalog(msgspec.Struct, frozen=True, kw_only=True):
    """The index versions of a deployment and the one that scorers read: one record, so that all move at one point.

    Attributes:
        active: the version that answers.
        versions: all that exist, by name.
        updated_ns: the writer's wall clock in ns.
    """

    v: int = SCHEMA_VERSION
    active: VersionName = BASE_VERSION
    versions: ByVersion[IndexVersion] = msgspec.field(default_factory=lambda: {BASE_VERSION: IndexVersion()})
    updated_ns: Nanoseconds = 0


class DecisionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A router sent a request to a pod (``kind`` decision), or what came of it.

    What came of it is what the events showed later (``kind`` outcome), or the engine's own word on its way back through
    the gateway (``kind`` served). A worker's is of no request: whose blocks a pod has stored (``kind`` sessions).

    Attributes:
        request_id: the router's id of the request, the Kafka key; empty in ``sessions``, whose key is the pod.
        pod: pod id it went to.
        pod_epoch: the pod's epoch when the decision was made.
        model: model name.
        keys: packed 16-byte block keys of the prompt's full blocks.
        predicted_blocks: blocks that the chosen pod was scored with.
        speculative_blocks: those of them that only decisions vouched for.
        scores: pod id -> (score, matched blocks) at decision time, best first, bounded.
        freshness: what the scores were based on: partition -> applied offset.
        pod_sequences: pod id -> last sequence known at decision time.
        scorer, decided_ns: who recorded it, and when: wall clock in ns.
        expires_ns: when the speculative holder ends at the latest.
        policy: how the pod was chosen, for people and what-if.
        outcome: ``hit``, ``unproven``, ``cold``, ``lost-eviction``, ``lost-stale``, ``wrong`` or empty while open.
        real_blocks: blocks that were there when the request ran, as far as the index shows later.
        endpoint: serving address, of a picker's decisions; empty for a router's.
        prompt_tokens: length of the prompt; of ``served`` by the engine's word, -1 when it does not say.
        predicted_tokens: tokens that the pod was expected to have cached.
        compute_tokens: tokens that it was expected to compute, for the load that pickers share.
        session, tenant: hash of the client's session, of the request's cache salt; empty for none.
        degraded: why the prompt was not scored, empty when it was.
        cached_tokens: of ``served``: tokens that the engine had cached, -1 when it does not say.
        first_token_ms: of ``served``: from the decision to the first token of a stream, -1 where there is none.
        status: of ``served``: HTTP status of the response, 0 when it was not seen.
        cause: of ``served``: why prediction and engine differ.
        regret_tokens: of ``served``: tokens that the best other pod would have cost less.
        sessions: of ``sessions``: hash of a session -> when the bridge received the event that named it, ns.
    """

    v: int = SCHEMA_VERSION
    kind: str = "decision"
    request_id: str
    pod: str
    pod_epoch: Epoch = 0
    model: str = ""
    keys: bytes = b""
    block_size_tokens: Tokens = 16
    predicted_blocks: Count = 0
    scores: dict[str, tuple[float, Count]] = {}
    freshness: dict[Partition, Sequence] = {}
    pod_sequences: dict[str, Sequence] = {}
    scorer: str = ""
    decided_ns: Nanoseconds = 0
    expires_ns: Nanoseconds = 0
    policy: str = ""
    outcome: str = ""
    real_blocks: Sequence = -1
    speculative_blocks: Count = 0
    endpoint: str = ""
    prompt_tokens: Sequence = 0
    predicted_tokens: Count = 0
    compute_tokens: float = 0.0
    session: str = ""
    tenant: str = ""
    degraded: str = ""
    cached_tokens: Sequence = -1
    first_token_ms: float = -1.0
    status: Sequence = 0
    cause: str = ""
    regret_tokens: float = 0.0
    sessions: dict[str, Nanoseconds] = {}


class KeyedStored(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="stored"):
    """A stored event whose token ids were stripped: the bridge computed the block keys instead.

    Attributes:
        engine_keys: engine keys of the blocks.
        parent: engine key before the first, None at the start of a prompt.
        block_keys: packed canonical keys, ``len(engine_keys) * keys_per_block`` of them.
        keys_per_block: canonical blocks in one engine block; 0 for blocks that could not be keyed, which mean what an
            event without tokens means: a tier is added to blocks that are known already.
        tier, group, window_tokens, block_size_tokens, lookahead, ownership, unnamed, bare, kind, lora,
            session: as in :class:`kvatlas.bridge.model.events.Stored`; kind is -1, and lora empty, for none said.
        names: as ``block_keys``, what the index knows the blocks by where the token behind a block counts; else empty.
        salted, pictured, adapted: the event's blocks have a salt, extra keys, an adapter.
        chunk_tokens: tokens of an unnamed event, which the tier loads as one.
    """

    engine_keys: list[bytes]
    parent: bytes | None
    block_keys: bytes
    keys_per_block: int
    tier: int
    group: int
    kind: int
    window_tokens: int
    block_size_tokens: int
    lookahead: bool = False
    names: bytes = b""
    ownership: str = ""
    unnamed: bool = False
    bare: bool = False
    salted: bool = False
    pictured: bool = False
    adapted: bool = False
    chunk_tokens: int = 0
    lora: str = ""
    session: str = ""


class KeyedRemoved(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="removed"):
    """A removal in a stripped batch; see :class:`kvatlas.bridge.model.events.Removed`."""

    engine_keys: list[bytes]
    tier: int
    group: int
    ownership: str = ""
    remaining: list[int | None] = []


class KeyedCleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """A clear in a stripped batch."""


class KeyedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Value of ``kv-events`` with content type ``keys``: a batch whose token ids never left the bridge."""

    v: int = SCHEMA_VERSION
    timestamp: float
    dp_rank: Tokens | None = None
    events: list[KeyedStored | KeyedRemoved | KeyedCleared] = []


R = TypeVar("R", bound=msgspec.Struct)

_encoder: Final = msgspec.msgpack.Encoder()
_version: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}


def encode(record: msgspec.Struct) -> bytes:
    """Encode a record of ours."""
    return _encoder.encode(record)


def decode(kind: type[R], value: bytes) -> R:
    """Decode a record.

    Raises:
        VersionError: the schema version is not known here.
        WireError: the bytes are not such a record.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    try:
        record: R = decoder.decode(value)
    except DECODE_ERRORS as error:
        raise _explain(kind, value, error) from error
    version = getattr(record, "v", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise VersionError(f"{kind.__name__} of schema version {version}; this build knows {SCHEMA_VERSION}")
    return record


def _explain(kind: type[Any], value: bytes, error: Exception) -> WireError:
    try:
        version = msgspec.msgpack.decode(_version.decode(value)["v"])
    except (*DECODE_ERRORS, KeyError):
        return WireError(f"not a {kind.__name__}: {error}")
    if version != SCHEMA_VERSION:
        return VersionError(f"{kind.__name__} of schema version {version}; this build knows {SCHEMA_VERSION}")
    return WireError(f"not a {kind.__name__}: {error}")
