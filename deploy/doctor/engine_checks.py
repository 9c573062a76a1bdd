"""Checks of one engine: what is wrong with what was seen of it. Pure, so that every misconfiguration has a test."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from kvatlas.bridge.engines.engine_metrics import read_load
from kvatlas.bridge.engines.facts import SGLANG, EngineFacts
from kvatlas.bridge.engines.identity import parse_topic
from kvatlas.bridge.model.numbers import whole
from kvatlas.deploy.doctor.engine import EngineSeen, SourceSeen
from kvatlas.deploy.doctor.findings import Finding, State

_CLOCK_SECONDS: Final = 5.0
#: What is named in events -> engine -> first version that names it.
_NAMED_SINCE: Final = {
    "salts": {"vllm": (0, 17), "sglang": (0, 5, 18)},
    "adapters": {"vllm": (0, 14), "sglang": (0, 5, 23)},
}
#: Methods with which SGLang keys its cache by pairs of tokens.
_PAIRING: Final = frozenset({"EAGLE", "EAGLE3", "NEXTN"})


def judge(seen: EngineSeen, block_size_tokens: int | None = None) -> list[Finding]:
    """Return the findings of one engine.

    Args:
        seen: what was seen of it.
        block_size_tokens: of the index, None where no scorer said it.
    """
    facts, url = seen.facts, seen.url
    if facts is None:
        return [Finding("api", url, "fail", seen.error)]
    named = f"{facts.engine} {facts.version or '(version not told)'}, serves {', '.join(facts.models) or 'no model'}"
    found = [Finding("api", url, "ok", named)]
    if not facts.sources:
        said = "events are off" if facts.knows_sources else "it does not tell where it publishes (vLLM before 0.31)"
        found.append(Finding("events", url, "fail" if facts.knows_sources else "skip", said))
    else:
        found.append(Finding("events", url, "ok", f"{len(facts.sources)} rank(s)"))
    found += _of_settings(facts, block_size_tokens)
    for source in seen.sources:
        found += _of_source(url, source)
    connected = [source for source in seen.sources if source.connected]
    if seen.probed and connected and not any(source.sequences for source in connected):
        found.append(Finding("sequence", url, "fail", "it computed a prompt, and no message came"))
    return [*found, *_of_groups(seen), *_of_speculation(seen, facts)]


def _of_settings(facts: EngineFacts, block_size_tokens: int | None) -> list[Finding]:
    url, found = facts.url, []
    if facts.prefix_caching is None:
        found.append(Finding("prefix-caching", url, "skip", "it does not tell"))
    else:
        on = facts.prefix_caching
        found.append(Finding("prefix-caching", url, "ok" if on else "fail", "on" if on else "off"))
    own = facts.block_size_tokens
    if own is None or block_size_tokens is None:
        found.append(Finding("block-size", url, "skip", f"the engine's: {own or 'not told'}, the index's: not told"))
    else:
        fits = own % block_size_tokens == 0 or block_size_tokens % own == 0
        said = f"{own} tokens in the engine, {block_size_tokens} in the index"
        found.append(Finding("block-size", url, "ok" if fits else "fail", said))
    found += [_of_name(facts, check) for check in _NAMED_SINCE]
    load = read_load(facts.page)
    told = ", ".join(f"{name} {value:g}" for name, value in load._asdict().items() if value is not None)
    told = told or (f"on its load socket {facts.load}" if facts.load else "")
    found.append(Finding("load", url, "ok" if told else "warn", told or "its /metrics has none"))
    return found


def _of_name(facts: EngineFacts, check: str) -> Finding:
    if not facts.version:
        return Finding(check, facts.url, "skip", "its version is not told")
    numbers = tuple(number for part in facts.version.split(".")[:3] if (number := whole(part)) is not None)
    if numbers and numbers < _NAMED_SINCE[check][facts.engine]:
        return Finding(check, facts.url, "warn", f"{facts.engine} {facts.version} does not publish {check}")
    return Finding(check, facts.url, "ok", "published")


def _of_groups(seen: EngineSeen) -> list[Finding]:
    kinds = {group: kind for source in seen.sources for group, kind in source.groups.items()}
    if not kinds:
        return []
    dumb = sorted(group for group, kind in kinds.items() if kind is None)
    if len(kinds) > 1 and dumb:
        said = f"{len(kinds)} groups, without an attention kind: {', '.join(map(str, dumb))}"
        return [Finding("hybrid", seen.url, "warn", said)]
    told = ", ".join(kind.name.lower() for _, kind in sorted(kinds.items()) if kind is not None)
    return [Finding("hybrid", seen.url, "ok", f"{len(kinds)} group(s){': ' if told else ''}{told}")]


def _of_speculation(seen: EngineSeen, facts: EngineFacts) -> list[Finding]:
    method, url = facts.speculation, seen.url
    if not method:
        return [Finding("speculation", url, "ok", "none")]
    if facts.engine != SGLANG:
        if seen.over_tokens is None:
            return [Finding("speculation", url, "skip", f"{method}; what it costs a match was not seen")]
        said = f"{method}, {max(seen.over_tokens, 0)} tokens fewer than predicted were cached"
        return [Finding("speculation", url, "warn" if seen.over_tokens > 0 else "ok", said)]
    plain = sum(source.plain for source in seen.sources)
    if method.upper() in _PAIRING and plain:
        return [Finding("speculation", url, "warn", f"{method}, but {plain} stores name no pairs of tokens")]
    return [Finding("speculation", url, "ok", method)]


def _of_source(url: str, seen: SourceSeen) -> list[Finding]:
    source = seen.source
    where = f"rank {source.rank}: "

    def finding(check: str, state: State, said: str) -> Finding:
        return Finding(check, url, state, where + said)

    found = [finding("live", "ok" if seen.connected else "fail", source.live)]
    if not source.replay:
        found.append(finding("replay", "warn", "none"))
    else:
        found.append(finding("replay", "ok", source.replay))
        answers = seen.replayed is not None
        said = f"{seen.replayed} messages in its buffer" if answers else f"{source.replay} does not answer"
        found.append(finding("replay-answers", "ok" if answers else "fail", said))
    known = seen.known_as.partition("@dp")[0]
    addresses = {one.partition("://")[2] for one in (source.live, url)}
    named = parse_topic(source.topic.encode()) or known not in ("", *addresses)
    said = f"{source.topic!r}{f', known as {known}' if known else ''}"
    found.append(finding("topic", "ok" if named else "warn", said))
    if seen.unreadable:
        found.append(
            finding("readable", "fail", f"{len(seen.unreadable)} messages cannot be read: {seen.unreadable[0]}")
        )
    elif seen.sequences or seen.replayed:
        found.append(finding("readable", "ok", f"{len(seen.sequences) + (seen.replayed or 0)} messages read"))
    return [*found, *_of_stream(finding, seen)]


def _of_stream(finding: Callable[[str, State, str], Finding], seen: SourceSeen) -> list[Finding]:
    found: list[Finding] = []
    if seen.sequences:
        steps = [later - sooner for sooner, later in pairwise(seen.sequences)]
        back = sum(step <= 0 for step in steps)
        said = (
            f"{len(seen.sequences)} live messages, {sum(step - 1 for step in steps if step > 0)} missing between them"
        )
        said += f", {back} times the sequence went back" if back else ""
        found.append(finding("sequence", "ok" if set(steps) <= {1} else "fail", said))
    if seen.clock_seconds is not None:
        off = seen.clock_seconds
        state: State = "ok" if abs(off) < _CLOCK_SECONDS else "warn"
        found.append(finding("clock", state, f"{abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"))
    if seen.bare_offload or seen.described_offload:
        state = "warn" if seen.bare_offload > seen.described_offload else "ok"
        said = f"{seen.described_offload} stores on offload tiers with tokens, {seen.bare_offload} without"
        found.append(finding("offload", state, said))
    return found
