"""Names of blocks under any order of GPU, CPU and storage events: nothing stands under another name than its own."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import msgspec
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import block_keys, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk
from kvatlas.streams.index.holders import ASSUMED

C = 16
DEPTH = 4
MODEL = "demo"
TIERS = {"GPU": Tier.GPU, "CPU": Tier.CPU, "STORAGE": Tier.DISK}
#: Pictures: identifier, first token, length in tokens.
PICTURES = (("img-a", 20, 20), ("img-b", 20, 20), ("img-a", 40, 8))


class Named(NamedTuple):
    """A prompt and what names it beyond its tokens; some prompts share their beginning, all the same token ids."""

    labels: tuple[int, ...]
    salt: str | None = None
    lora: str | None = None
    picture: int | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for label in self.labels for token in [100 + label] * C]

    def extra(self, block: int) -> list[Any] | None:
        """Return the extra keys of a block as vLLM lists them."""
        found: list[Any] = [self.lora] if self.lora else []
        if self.picture is not None:
            identifier, offset, length = PICTURES[self.picture]
            if offset < (block + 1) * C and offset + length > block * C:
                found.append([identifier, offset - block * C])
        return (found + ([self.salt] if self.salt and not block else [])) or None

    @property
    def engine_keys(self) -> list[int]:
        """Return the engine's hashes: of everything that names a block."""
        keys, parent = [], 0
        for block, label in enumerate(self.labels):
            parent = xxhash.xxh3_64_intdigest(repr((parent, label, self.extra(block))).encode())
            keys.append(parent)
        return keys

    @property
    def keys(self) -> list[bytes]:
        items = [] if self.picture is None else [PICTURES[self.picture]]
        extra = multimodal_extra(items, C, len(self.labels))
        return block_keys(root_key(MODEL, self.lora, self.salt), pack_tokens(self.tokens), C, extra)


labels = st.lists(st.integers(0, 1), min_size=1, max_size=DEPTH).map(tuple)
prompts = st.builds(
    Named,
    labels,
    st.sampled_from([None, None, "a", "f" * 64]),
    st.sampled_from([None, None, "sql"]),
    st.sampled_from([None, None, 0, 1, 2]),
)


class Step(NamedTuple):
    """One event: blocks ``first`` to ``last`` of a prompt are stored on a medium, or leave it."""

    prompt: Named
    medium: str
    first: int
    last: int
    stored: bool
    told: bool

    def event(self) -> dict[str, Any]:
        keys = self.prompt.engine_keys
        group = {"group_idx": 0, "medium": self.medium, "block_hashes": keys[self.first : self.last]}
        if not self.stored:
            return {"type": "BlockRemoved", **group}
        event = {"type": "BlockStored", **group, "lora_id": None, "lora_name": self.prompt.lora}
        if not self.told:
            return {**event, "parent_block_hash": None, "token_ids": [], "block_size": 0, "lora_name": None}
        event |= {
            "parent_block_hash": keys[self.first - 1] if self.first else None,
            "token_ids": self.prompt.tokens[self.first * C : self.last * C],
            "block_size": C,
            "kv_cache_spec_kind": "full_attention",
        }
        if self.medium == "GPU":
            event["extra_keys"] = [self.prompt.extra(block) for block in range(self.first, self.last)]
        return event


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Return events of a few prompts in any order; an engine announces blocks of the GPU with all that names them."""
    found = []
    for prompt in draw(st.lists(prompts, min_size=1, max_size=4)):
        size = len(prompt.labels)
        for _ in range(draw(st.integers(1, 5))):
            first = draw(st.integers(0, size - 1))
            last = draw(st.integers(first + 1, size))
            medium = draw(st.sampled_from(sorted(TIERS)))
            stored = draw(st.booleans()) or draw(st.booleans())
            found.append(Step(prompt, medium, first, last, stored, told=medium == "GPU" or draw(st.booleans())))
    return draw(st.permutations(found))


def universe(told: list[Step]) -> list[Named]:
    """Return every prompt that anybody could ask about what was stored."""
    salts, loras = {None, *(s.prompt.salt for s in told)}, {None, *(s.prompt.lora for s in told)}
    pictures = {None, *(s.prompt.picture for s in told)}
    return [
        Named(step.prompt.labels, salt, lora, picture)
        for step in {step.prompt.labels: step for step in told}.values()
        for salt in salts
        for lora in loras
        for picture in pictures
    ]


def apply(held: Counter[tuple[int, str]], step: Step) -> None:
    for key in step.prompt.engine_keys[step.first : step.last]:
        if step.stored:
            held[key, step.medium] += 1
        elif held[key, step.medium]:
            held[key, step.medium] -= 1


def send(world: Any, group: list[Step]) -> None:
    payload = msgspec.msgpack.encode((1.0, [step.event() for step in group], 0))
    world.raw("p", payload, model=MODEL)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(told=steps(), per_message=st.integers(1, 4), salted=st.booleans())
def test_no_block_stands_under_another_name(world, told, per_message, salted):
    """A block has its own name or none; that of its tokens alone only while nothing else names the pod's blocks."""
    w = world()
    held: Counter[tuple[int, str]] = Counter()
    if salted:  # the pod has used salts before
        told = [Step(Named((1,), "seen"), "GPU", 0, 1, stored=True, told=True), *told]
    everything = universe(told)
    for at in range(0, len(told), per_message):
        group = told[at : at + per_message]
        send(w, group)
        for step in group:
            apply(held, step)
        state = w.state("p")
        names = any(
            s.medium == "GPU" and s.stored and any(isinstance(x, list) or x == s.prompt.salt for x in extra)
            for s in told[: at + per_message]
            for block in range(s.first, s.last)
            if (extra := s.prompt.extra(block))
        )
        assert w.pods["p"].named == state.named == names
        for prompt in everything:
            for key, engine_key in zip(prompt.keys, prompt.engine_keys, strict=True):
                for holder in w.holders(key):
                    if holder.pod_ref != pod_ref("p") or (holder.kind & ASSUMED and names):
                        continue
                    medium = next(name for name, tier in TIERS.items() if tier == holder.tier)
                    assert held[engine_key, medium] or holder.kind & ASSUMED, (prompt, medium)
    assert not w.dead


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(prompts, min_size=1, max_size=4, unique=True), evicted=st.sets(st.integers(0, 3)), data=st.data())
def test_what_the_gpu_named_first_is_found_on_every_tier(world, asked, evicted, data):
    """GPU events first, as engines send them: each prompt matches exactly what any tier holds under its name."""
    w = world()
    held: Counter[tuple[int, str]] = Counter()
    told = [Step(prompt, "GPU", 0, len(prompt.labels), stored=True, told=True) for prompt in asked]
    offloads = [
        Step(prompt, medium, block, block + 1, stored=True, told=data.draw(st.booleans()))
        for prompt in asked
        for block in range(len(prompt.labels))
        for medium in data.draw(st.sets(st.sampled_from(["CPU", "STORAGE"])))
    ]
    told += data.draw(st.permutations(offloads)) if offloads else []
    told += [
        Step(prompt, "GPU", 0, len(prompt.labels), stored=False, told=True)
        for number, prompt in enumerate(asked)
        if number in evicted
    ]
    for step in told:
        send(w, [step])
        apply(held, step)
    scene = Fleet(w.pods.values(), C).scene(MODEL, Weights())
    for prompt in universe(told):
        values = [w.value(key) for key in prompt.keys]
        matches, _ = walk(values, scene, len(prompt.tokens), whole_prompt=True)
        expected = gpu = 0
        keys = prompt.engine_keys
        while gpu < len(keys) and held[keys[gpu], "GPU"]:
            gpu += 1
        for number, key in enumerate(keys):
            if number >= gpu and not (held[key, "CPU"] or held[key, "STORAGE"]):
                break
            expected = number + 1
        assert (matches[0].blocks if matches else 0) == expected, prompt
