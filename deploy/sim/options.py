"""Settings of the simulated fleet: section ``sim``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section


class SimSettings(Section, frozen=True, kw_only=True):
    """How many pods, how big, and what traffic they get."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "affinity", "always_usage", "canonical_block_size_tokens", "lora_share", "output_tokens",
        "pod_prefix", "salted_share", "step_ms", "system_prompts", "system_tokens", "tokens_per_second",
        "topic", "trace_output_tokens", "trace_speed", "turns", "user_tokens", "vocabulary", "wire",
    ))  # fmt: skip

    pods: Annotated[int, Meta(description="simulated pods", ge=1, le=1000)] = 8
    blocks: Annotated[int, Meta(description="GPU blocks of each pod", ge=1)] = 2048
    block_size_tokens: Annotated[int, Meta(description="tokens in one engine block", ge=1, le=4096)] = 16
    cpu_blocks: Annotated[int, Meta(description="blocks of each pod's CPU tier, 0 for none", ge=0)] = 0
    seed: Annotated[int, Meta(description="same seed, same traffic and same engine keys", ge=0)] = 1
    model: Annotated[str, Meta(description="model name that the pods serve")] = "sim-model"
    host: Annotated[str, Meta(description="address that the pods bind")] = "127.0.0.1"
    base_port: Annotated[
        int, Meta(description="first of two ports a pod (live, replay); 0 takes free ones", ge=0, le=65_000)
    ] = 0
    truth_listen: Annotated[str, Meta(description="HOST:PORT of the truth endpoint; port 0 takes a free one")] = (
        "127.0.0.1:0"
    )
    engines_file: Annotated[str, Meta(description="write the endpoints to this file, for the bridge to watch")] = ""
    requests_per_second: Annotated[float, Meta(description="traffic of the whole fleet", gt=0)] = 20.0
    requests: Annotated[int, Meta(description="stop sending after so many requests, 0 for no end", ge=0)] = 0
    duration_seconds: Annotated[float, Meta(description="end after so long, 0 for no end", ge=0)] = 0.0
    trace: Annotated[str, Meta(description="play this trace file (.jsonl or .jsonl.gz) instead of conversations")] = ""
    sessions: Annotated[int, Meta(description="conversations open at a time", ge=1)] = 32
    max_running: Annotated[int, Meta(description="requests a pod runs at a time", ge=1)] = 8
    serve_port: Annotated[
        int, Meta(description="with --serve: first of one HTTP port a pod; 0 takes free ones", ge=0, le=65_000)
    ] = 0
    clear_probability: Annotated[float, Meta(description="chance of a clear, per request", ge=0, le=1)] = 0.0
    restart_probability: Annotated[float, Meta(description="chance of a restart, per request", ge=0, le=1)] = 0.0


class SimPlan(SimSettings, frozen=True, kw_only=True):
    """The settings, and the shape of engines and traffic that benches and tests vary and nobody who runs a fleet does.

    Attributes:
        canonical_block_size_tokens: canonical block size of the deployment, for the truth.
        topic: ZMQ topic; {pod} and {model} are filled in.
        wire: event layout: map as vLLM since 0.24, array as before.
        pod_prefix: pods are called by this and a number.
        trace_speed: a trace's seconds for each of ours.
        trace_output_tokens: longest output of a traced request.
        turns: turns of a conversation.
        system_prompts: different system prompts.
        system_tokens: tokens of a system prompt.
        user_tokens: mean tokens of a user's turn.
        output_tokens: mean tokens of an answer.
        vocabulary: token ids are below this.
        salted_share: share of conversations with a cache salt.
        lora_share: share of conversations with an adapter.
        affinity: share of turns sent to the pod of the turn before.
        tokens_per_second: of a served fleet: prompt tokens that a pod computes in a second.
        step_ms: of a served fleet: time of one generated token.
        always_usage: of a served fleet: end every stream with its usage, asked for or not.
    """

    canonical_block_size_tokens: int = 16
    topic: str = "kv@{pod}@{model}"
    wire: Literal["map", "array"] = "map"
    pod_prefix: str = "pod-"
    trace_speed: float = 1.0
    trace_output_tokens: int = 256
    turns: int = 6
    system_prompts: int = 4
    system_tokens: int = 256
    user_tokens: int = 64
    output_tokens: int = 64
    vocabulary: int = 32000
    salted_share: float = 0.1
    lora_share: float = 0.0
    affinity: float = 0.8
    tokens_per_second: float = 50000.0
    step_ms: float = 2.0
    always_usage: bool = True

    @classmethod
    def of(cls, settings: SimSettings) -> SimPlan:
        """Return the plan of a fleet as it is set."""
        return cls(**msgspec.structs.asdict(settings))
