"""Settings of the simulated fleet: section ``sim``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section


class SimSettings(Section, frozen=True, kw_only=True):
    """How many pods, how big, and what traffic they get."""

    pods: Annotated[int, Meta(description="simulated pods", ge=1, le=1000)] = 8
    blocks: Annotated[int, Meta(description="GPU blocks of each pod", ge=1)] = 2048
    block_size_tokens: Annotated[int, Meta(description="tokens in one engine block", ge=1, le=4096)] = 16
    canonical_block_size_tokens: Annotated[
        int, Meta(description="canonical block size of the deployment, for the truth", ge=1, le=4096)
    ] = 16
    cpu_blocks: Annotated[int, Meta(description="blocks of each pod's CPU tier, 0 for none", ge=0)] = 0
    seed: Annotated[int, Meta(description="same seed, same traffic and same engine keys", ge=0)] = 1
    model: Annotated[str, Meta(description="model name that the pods serve")] = "sim-model"
    topic: Annotated[str, Meta(description="ZMQ topic; {pod} and {model} are filled in")] = "kv@{pod}@{model}"
    wire: Annotated[
        Literal["map", "array"], Meta(description="event layout: map as vLLM since 0.24, array as before")
    ] = "map"
    pod_prefix: Annotated[str, Meta(description="pods are called by this and a number")] = "pod-"
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
    trace_speed: Annotated[float, Meta(description="a trace's seconds for each of ours", gt=0)] = 1.0
    trace_output_tokens: Annotated[int, Meta(description="longest output of a traced request", ge=1)] = 256
    sessions: Annotated[int, Meta(description="conversations open at a time", ge=1)] = 32
    turns: Annotated[int, Meta(description="turns of a conversation", ge=1)] = 6
    system_prompts: Annotated[int, Meta(description="different system prompts", ge=1)] = 4
    system_tokens: Annotated[int, Meta(description="tokens of a system prompt", ge=0)] = 256
    user_tokens: Annotated[int, Meta(description="mean tokens of a user's turn", ge=1)] = 64
    output_tokens: Annotated[int, Meta(description="mean tokens of an answer", ge=1)] = 64
    vocabulary: Annotated[int, Meta(description="token ids are below this", ge=2)] = 32_000
    salted_share: Annotated[float, Meta(description="share of conversations with a cache salt", ge=0, le=1)] = 0.1
    lora_share: Annotated[float, Meta(description="share of conversations with an adapter", ge=0, le=1)] = 0.0
    affinity: Annotated[float, Meta(description="share of turns sent to the pod of the turn before", ge=0, le=1)] = 0.8
    max_running: Annotated[int, Meta(description="requests a pod runs at a time", ge=1)] = 8
    serve_port: Annotated[
        int, Meta(description="with --serve: first of one HTTP port a pod; 0 takes free ones", ge=0, le=65_000)
    ] = 0
    tokens_per_second: Annotated[
        float, Meta(description="with --serve: prompt tokens that a pod computes in a second", gt=0)
    ] = 50_000.0
    step_ms: Annotated[float, Meta(description="with --serve: time of one generated token", ge=0)] = 2.0
    always_usage: Annotated[
        bool, Meta(description="with --serve: end every stream with its usage, asked for or not")
    ] = True
    clear_probability: Annotated[float, Meta(description="chance of a clear, per request", ge=0, le=1)] = 0.0
    restart_probability: Annotated[float, Meta(description="chance of a restart, per request", ge=0, le=1)] = 0.0
