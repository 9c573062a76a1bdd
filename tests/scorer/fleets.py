"""Fleets drawn at random: hybrid groups, windows, shared stores, clears, gaps, guesses, silent partitions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec

from kvatlas.bridge.model.block_key import KEY_BYTES, block_keys, pack_tokens, partition_of, root_key
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import GONE, LIVE, STALE, DecisionRecord, GroupSpec, PodRecord
from kvatlas.bridge.model.validity import SPECULATIVE
from kvatlas.scorer.scoring.lookup import ACTIVE, Answers, Seen
from kvatlas.streams.index.holders import ASSUMED, add_holder, pack_holder

SIZE = 16
MODEL = "m"
PARTITIONS = 4
NOW_NS = 1_700_000_000_000_000_000
SALTS = ("", "tenant")

_KINDS = (
    GroupSpec(Kind.FULL, 0, SIZE),
    GroupSpec(Kind.FULL, 0, 2 * SIZE),
    GroupSpec(Kind.SLIDING_WINDOW, 33, SIZE),
    GroupSpec(Kind.MAMBA, 0, SIZE),
    GroupSpec(Kind.CHUNKED_LOCAL, 48, SIZE),
    GroupSpec(Kind.CROSS, 0, SIZE),
)


class RandomFleet:
    """Pods, what the index says of one prompt's blocks, and what is decided.

    Attributes:
        pods: merged records, those of gone pods as well.
        tokens: the prompt's token ids.
        table: block key -> packed holders.
        decisions: open decisions about the prompt.
        silent: partitions that do not answer.
    """

    def __init__(self, dice: random.Random, *, silent: bool = True, guesses: bool = True, first_token: int = 0) -> None:
        self.pods = [_pod(dice, name) for name in ("a", "b", "c", "d")[: dice.randint(1, 4)]]
        self.tokens = list(range(first_token, first_token + dice.randint(0, 12 * SIZE)))
        self.salt = dice.choice(SALTS)
        self.keys = block_keys(root_key(MODEL, None, self.salt or None), pack_tokens(self.tokens), SIZE)
        self.table: dict[bytes, bytes] = {}
        at = 0
        while at < len(self.keys):
            value, run = _value(dice, self.pods), dice.randint(1, 5)
            self.table.update({key: value for key in self.keys[at : at + run] if value})
            at += run
        self.decisions = [self._decision(dice, number) for number in range(dice.randint(0, 2) if guesses else 0)]
        self.silent = {dice.randrange(PARTITIONS)} if silent and dice.random() < 0.3 else set()

    def speculating(self, dice: random.Random) -> RandomFleet:
        """Let some pods compute the last block that they matched again."""
        self.pods = [msgspec.structs.replace(pod, computes_again=dice.random() < 0.3) for pod in self.pods]
        return self

    def _decision(self, dice: random.Random, number: int) -> DecisionRecord:
        pod = dice.choice(self.pods)
        return DecisionRecord(
            request_id=f"r{number}",
            pod=pod.pod,
            pod_epoch=dice.randint(0, pod.epoch),
            model=MODEL,
            keys=b"".join(self.keys[: dice.randint(0, len(self.keys))]),
            block_size_tokens=SIZE,
            decided_ns=NOW_NS,
            expires_ns=NOW_NS + 10**9,
        )


class TableLookup:
    """Lookups in a table of a test; silent partitions have no answer."""

    first_blocks = 0
    stale = False

    def __init__(self, fleet: RandomFleet) -> None:
        self._fleet = fleet

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        fleet = self._fleet
        parts = [partition_of(key, PARTITIONS) for key in keys]
        values = [
            None if part in fleet.silent else fleet.table.get(key, b"") for part, key in zip(parts, keys, strict=True)
        ]
        return Answers(values, {part: Seen(ACTIVE, "w0", 7, NOW_NS - 1) for part in set(parts) - fleet.silent})

    def unready(self) -> str | None:
        return None

    async def forget_gone(self) -> None: ...

    async def close(self) -> None: ...


def _pod(dice: random.Random, name: str) -> PodRecord:
    epoch = dice.randint(0, 3)
    below: Callable[[], int] = lambda: dice.choice((0, 0, dice.randint(0, epoch)))  # noqa: E731
    groups = {number: dice.choice(_KINDS) for number in range(dice.choice((0, 1, 1, 2, 2, 3)))}
    return PodRecord(
        pod=name,
        writer="streams",
        state=dice.choice((LIVE, LIVE, LIVE, STALE, GONE)),
        epoch=epoch,
        valid_from=below(),
        gpu_valid_from=below(),
        suspect_before=below(),
        model=dice.choice((MODEL, MODEL, MODEL, "other", "")),
        block_size_tokens=dice.choice((0, SIZE, 2 * SIZE)),
        last_sequence=dice.randint(-1, 9),
        receive_ns=dice.choice((0, NOW_NS - 5_000_000)),
        groups=groups,
        store=dice.choice(("", "", "s")),
        load=dice.choice(({}, {"waiting": 2.0})),
        load_ns=NOW_NS,
        approximate=dice.random() < 0.2,
        chunk_tokens=dice.choice((0, 0, 0, 4 * SIZE)),
        named=dice.random() < 0.2,
    )


def _value(dice: random.Random, pods: Sequence[PodRecord]) -> bytes:
    value = b""
    for pod in pods:
        if dice.random() < 0.15:
            continue
        for group in {*pod.groups, *(() if pod.groups else (0,))}:
            if dice.random() < 0.15:
                continue
            for tier in {dice.choice((1, 1, 1, 2, 3, 0)), dice.choice((1, 2))}:
                kind = pod.groups[group].kind if group in pod.groups else Kind.FULL
                kind |= ASSUMED if dice.random() < 0.1 else 0
                epoch = pod.epoch if dice.random() < 0.7 else dice.randint(0, pod.epoch)
                value = add_holder(value, pack_holder(pod_ref(pod.pod), group, tier, kind, 0, epoch))
    if dice.random() < 0.2:
        value = add_holder(value, pack_holder(store_ref("s"), 0, int(Tier.SHARED), 0, 0, 0))
    if dice.random() < 0.1:
        value = add_holder(value, pack_holder(pod_ref("unheard"), 0, 1, 0, 0, 0))
    return value


def decided(fleet: RandomFleet) -> dict[bytes, bytes]:
    """The table with the open decisions' holders written into it."""
    extra: dict[bytes, set[bytes]] = {}
    for made in fleet.decisions:
        for at in range(0, len(made.keys), KEY_BYTES):
            holder = pack_holder(pod_ref(made.pod), 0, SPECULATIVE, 0, 0, made.pod_epoch)
            extra.setdefault(made.keys[at : at + KEY_BYTES], set()).add(holder)
    return fleet.table | {key: fleet.table.get(key, b"") + b"".join(sorted(held)) for key, held in extra.items()}
