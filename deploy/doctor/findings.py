"""Catalogue of the doctor's checks, and what a check found. Pure.

One entry per check: what is wrong when it fails, and the fix. The page docs/troubleshooting.md is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

State = Literal["ok", "warn", "fail", "skip"]


class Check(NamedTuple):
    """One thing that the doctor looks at.

    Attributes:
        about: ``engine``, ``system`` or ``probe``.
        what: what holds when it is in order.
        harm: what happens to hits when it does not.
        fix: what to do.
        after: checks whose failure makes this one fail too, so that it says nothing new then.
    """

    about: str
    what: str
    harm: str
    fix: str
    after: tuple[str, ...] = ()


_EVENTS: Final = (
    'start vLLM with `--kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": '
    '"tcp://*:5557", "replay_endpoint": "tcp://*:5558", "topic": "kv@POD@MODEL"}\'`, SGLang with '
    '`--kv-events-config \'{"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": '
    '"tcp://*:5558", "topic": "kv@POD@MODEL"}\'`'
)

#: What has to be in order before anything is on the log and applied, and before an engine's blocks are found.
_LOG: Final = ("kafka", "topics", "retention", "rights", "workers", "lag")
_HEARD: Final = ("events", "live", "sequence", "readable", "block-size", "prefix-caching")

CHECKS: Final[Mapping[str, Check]] = {
    "api": Check(
        "engine",
        "the engine's API answers",
        "nothing can be told of an engine that is not there",
        "give the address of its OpenAI API, `http://HOST:PORT`, and look at the engine's log",
    ),
    "events": Check("engine", "the engine publishes events", "its cache is never in the index: no hit, ever", _EVENTS),
    "live": Check(
        "engine",
        "the live socket can be reached",
        "no event arrives",
        "open the port of `endpoint` between engine and bridge; in Kubernetes name it in the pod's ports. vLLM listens "
        "only where the host of `endpoint` is `*` or `::`; with another it connects, to a bridge that binds (`--bind`)",
    ),
    "replay": Check(
        "engine",
        "the engine has a replay socket",
        "a message that is lost once stays lost: older blocks become suspect",
        "give `replay_endpoint` in `--kv-events-config`, on a port of its own",
    ),
    "replay-answers": Check(
        "engine",
        "the replay socket answers",
        "holes cannot be repaired, and events from before the bridge came are missed",
        "open the port of `replay_endpoint`; with several ranks it is the port plus the rank",
    ),
    "topic": Check(
        "engine",
        "the topic or the endpoint's options name the pod",
        "the pod is known by its address, which a restart may change",
        "set `topic` to `kv@POD@MODEL`, or give `pod=` and `model=` to the endpoint",
    ),
    "block-size": Check(
        "engine",
        "the engine's block size fits the index's",
        "blocks that do not line up are indexed in part or not at all",
        "choose the workers' `block_size_tokens` so that one divides the other (`kvatlas reindex` changes it)",
    ),
    "prefix-caching": Check(
        "engine",
        "the engine reuses prefixes",
        "it computes every prompt whole, whatever the index says",
        "start vLLM with `--enable-prefix-caching`, SGLang without `--disable-radix-cache`",
    ),
    "sequence": Check(
        "engine",
        "messages come without holes",
        "what a lost message said is missing until it is replayed",
        "raise `hwm` in `--kv-events-config`, and look at the network between engine and bridge",
    ),
    "clock": Check(
        "engine",
        "the engine's clock agrees with this machine's",
        "ages in answers and dashboards are wrong",
        "run a time service on both machines",
    ),
    "readable": Check(
        "engine",
        "every event can be read",
        "events that cannot be read are in the dead-letter topic, not in the index",
        "read the reasons with `kvatlas replay --topic kv-events-dlq`; check `engine=` of the endpoint",
    ),
    "offload": Check(
        "engine",
        "offload tiers describe their blocks",
        "what is on those tiers is known only for blocks seen on the GPU",
        "set `self_describing_kv_events: true` in the connector's extra configuration",
    ),
    "salts": Check(
        "engine",
        "events carry cache salts",
        "tenants cannot be told apart: a prompt matches what another tenant has stored",
        "use vLLM 0.17, SGLang 0.5.18 or newer, or no salts",
    ),
    "adapters": Check(
        "engine",
        "events name adapters (LoRA)",
        "a prompt matches blocks of another adapter, or none",
        "use vLLM 0.14, SGLang 0.5.23 or newer, or no adapters",
    ),
    "speculation": Check(
        "engine",
        "predictions count what speculative decoding costs a match",
        "a block less is cached than is predicted",
        "vLLM with EAGLE or MTP computes the last block that it matched again: give the endpoint `speculation=METHOD` "
        "(an engine in development mode tells it by itself, given as `http://`). In SGLang look for `token_ids` of "
        "pairs in the events: a build that sends none keys its cache otherwise",
    ),
    "hybrid": Check(
        "engine",
        "every group of a hybrid model's cache says its kind of attention",
        "a group that does not counts as full attention: matches may be shorter than what the engine reuses",
        "use vLLM 0.22 or newer",
    ),
    "load": Check(
        "engine",
        "the engine tells its load",
        "pickers share out requests by prefixes and by what they gave out themselves",
        "start vLLM without `--disable-log-stats`, SGLang with `--enable-metrics`",
    ),
    "kafka": Check(
        "system",
        "Kafka answers",
        "nothing is recorded and nothing is learnt",
        "check `--brokers` and the security settings; `kvatlas broker start` starts one for trying out",
    ),
    "topics": Check(
        "system",
        "the topics exist as the settings say",
        "services do not start, or look for records in other partitions",
        "`kvatlas topics` makes them; give `--partitions` as they are",
    ),
    "retention": Check(
        "system",
        "topics keep records as long as restarts and rebuilds need them",
        "a worker that comes back late, or a new index, lacks blocks; without compaction tables are not restored",
        "set `retention.ms`, `retention.bytes=-1`, `cleanup.policy` with Kafka's own tools, as docs/topics.md has them",
    ),
    "rights": Check(
        "system",
        "this account may read what the services read",
        "services are refused",
        "`kvatlas topics --acls` prints the commands that give the rights",
    ),
    "workers": Check(
        "system",
        "live workers own every partition",
        "blocks of partitions without an owner are missing from every score",
        "start `kvatlas worker`, or look at the log of the one that is restoring",
    ),
    "lag": Check(
        "system",
        "workers have applied what is on the log",
        "new blocks are missing from scores, and removed ones still count",
        "start more workers or give them more CPU; where nothing moves, look at the worker's log",
    ),
    "scorer": Check(
        "system",
        "the scorer answers, from the whole index",
        "no request is routed by its prefix",
        "start `kvatlas scorer`, and look at its `/readyz`",
        _LOG,
    ),
    "pods": Check(
        "system",
        "the scorer knows the engine's pod, and it is live",
        "the pod is never chosen for what it holds",
        "give the engine to the bridge (`--engines`), and look at the bridge's log",
        ("live", *_LOG, "scorer"),
    ),
    "model-name": Check(
        "system",
        "the model's name is the same for clients, engine and index",
        "prompts are scored under a name that nobody stored anything under",
        "ask with the engine's first served name, or give the other names as aliases",
    ),
    "gaps": Check(
        "system",
        "nothing was lost for good",
        "blocks from before a gap count half, or not at all",
        "give the engine a replay socket, and more `buffer_steps`",
    ),
    "picker-load": Check(
        "system",
        "the picker has ready endpoints and fresh load of each (`--picker HOST:PORT`)",
        "it shares out requests by prefixes and by what it gave out itself, or has nowhere to send them",
        "see that pickers reach each engine's `/metrics`; for none ready, look at the pool or the endpoints file",
    ),
    "tokens": Check(
        "probe",
        "engine and scorer make the same tokens of a text",
        "no block key of a prompt is one that the engine stored",
        "give the scorer the engine's own tokenizer folder (`--tokenizer MODEL=DIR`)",
    ),
    "template": Check(
        "probe",
        "engine and scorer make the same tokens of a chat",
        "no block key of a chat is one that the engine stored",
        "give the scorer the engine's own chat template (`--chat-template` of the engine, in the tokenizer's folder)",
    ),
    "probe": Check(
        "probe",
        "a prompt sent twice is found where it was sent",
        "predictions do not come true",
        "read `kvatlas explain` for the prompt: it says where each pod's walk ended and why",
        (*_HEARD, *_LOG, "scorer", "pods", "model-name", "tokens"),
    ),
    "usage": Check(
        "probe",
        "the engine tells how many tokens it had cached",
        "predictions cannot be compared with what came of them",
        "start vLLM with `--enable-prompt-tokens-details`, SGLang with `--enable-cache-report`",
    ),
}


class Finding(msgspec.Struct, frozen=True):
    """What one check found.

    Attributes:
        check: name in :data:`CHECKS`.
        subject: the engine, topic or service it is about.
        state: ``ok``, ``warn`` (works, but), ``fail``, or ``skip`` (could not be looked at).
        said: one sentence of what was found.
    """

    check: str
    subject: str
    state: State
    said: str

    def __post_init__(self) -> None:
        """Refuse a check that is not in the catalogue."""
        assert self.check in CHECKS, self.check


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 where nothing failed, 1 otherwise; warnings do not count."""
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def without_echoes(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings; a failure that follows from another one, of its engine or of the system, is not counted."""
    failed = [finding for finding in findings if finding.state == "fail"]

    def told(finding: Finding) -> Finding:
        causes = [
            cause.check
            for cause in failed
            if cause.check in CHECKS[finding.check].after
            and (CHECKS[cause.check].about == "system" or cause.subject == finding.subject)
        ]
        if finding.state != "fail" or not causes:
            return finding
        return Finding(finding.check, finding.subject, "skip", f"{finding.said} (follows from {causes[0]})")

    return [told(finding) for finding in findings]


def by_subject(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with those of one subject together, in the order in which subjects first come."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.subject, []).append(finding)
    return [finding for group in groups.values() for finding in group]


def page(findings: Iterable[Finding]) -> str:
    """Return the findings as text, by subject, with the fix below what is not in order."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}
    lines: list[str] = []
    subject = None
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            lines += ["", subject] if lines else [subject]
        lines.append(f"  {marks[finding.state]} {finding.check:<15} {finding.said}")
        if finding.state in ("warn", "fail"):
            check = CHECKS[finding.check]
            lines += [f"       {'':<15} so: {check.harm}", f"       {'':<15} fix: {check.fix}"]
    return "\n".join(lines)


def markdown() -> str:
    """Return docs/troubleshooting.md."""
    titles = {"engine": "Engines", "system": "Kafka, workers, scorer", "probe": "The live probe"}
    lines = [
        "# Troubleshooting",
        "",
        "`kvatlas doctor http://ENGINE:8000` checks all of this and says what to do; its exit code is 1 where a check",
        "fails, and `--json` gives one object a finding. This page is made by `kvatlas doctor --markdown`.",
    ]
    for about, title in titles.items():
        lines += ["", f"## {title}", "", "| check | in order when | otherwise | fix |", "|---|---|---|---|"]
        for name, check in CHECKS.items():
            if check.about == about:
                lines.append(f"| `{name}` | {check.what} | {check.harm} | {check.fix.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"
