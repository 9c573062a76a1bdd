"""Settings of a scorer: section ``scorer``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section

MIB = 1024 * 1024


class ScorerSettings(Section, frozen=True, kw_only=True):
    """What one ``kvatlas scorer`` serves, how it weighs, and what it allows."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "compat", "http_body_seconds", "http_header_seconds", "lookup_chunk_blocks",
        "lookup_chunk_max_blocks", "max_batch", "max_inflight_bytes", "max_messages", "max_multimodal",
        "max_watchers", "pick_tie_break", "pick_weight_cache", "pick_weight_cache_usage",
        "pick_weight_running", "pick_weight_waiting", "remembered_requests", "require_workers",
        "speculative_max_blocks", "speculative_max_decisions", "start_timeout_seconds", "stop_grace_seconds",
        "weight_gpu", "weight_speculative", "weight_unknown",
    ))  # fmt: skip

    listen: Annotated[str, Meta(description="gRPC address, host:port; port 0 takes a free one")] = "127.0.0.1:50051"
    socket: Annotated[str, Meta(description="also serve gRPC on this Unix socket (path); empty: none")] = ""
    http_listen: Annotated[str, Meta(description="HTTP/JSON address, host:port; empty: none")] = ""
    telemetry_listen: Annotated[
        str, Meta(description="address of /metrics, /healthz and /readyz, host:port; empty: none")
    ] = ""
    reflection: Annotated[bool, Meta(description="serve gRPC reflection")] = False
    name: Annotated[str, Meta(description="this scorer's name in decisions; empty: host and process")] = ""

    index_version: Annotated[
        str,
        Meta(description="answer from this index version; empty: the active one of `kvatlas reindex`"),
    ] = ""
    block_size_tokens: Annotated[
        int, Meta(description="tokens in a canonical block; 0 takes it from the workers", ge=0, le=4096)
    ] = 0

    weight_cpu: Annotated[float, Meta(description="worth of a block in host memory", ge=0)] = 0.8
    weight_disk: Annotated[float, Meta(description="worth of a block on the pod's disk", ge=0)] = 0.5
    weight_shared: Annotated[float, Meta(description="worth of a block in a shared store", ge=0)] = 0.4
    suspect_factor: Annotated[
        float, Meta(description="multiplies blocks seen before an unrepaired gap; 0 ends the match there", ge=0, le=1)
    ] = 0.5
    strategy: Annotated[str, Meta(description="scoring strategy where neither request nor model names one")] = (
        "longest-prefix"
    )
    models: Annotated[
        list[str],
        Meta(description="per-model settings, MODEL:KEY=VALUE[,KEY=VALUE]; keys: strategy and the weight names"),
    ] = []  # noqa: RUF012 - a msgspec default, copied per value

    aliases: Annotated[
        list[str],
        Meta(description="NAME=MODEL: clients call the model NAME, its engines and their topics MODEL"),
    ] = []  # noqa: RUF012 - a msgspec default, copied per value
    adapters: Annotated[
        list[str],
        Meta(
            description="NAME=MODEL: requests that name the model NAME mean this adapter (LoRA) of MODEL; adapters "
            "that events name are known without it"
        ),
    ] = []  # noqa: RUF012 - a msgspec default, copied per value

    deadline_ms: Annotated[
        float,
        Meta(description="a request may take so long when the caller sets no deadline, and its lookups always", gt=0),
    ] = 1_000.0
    hedge_ms: Annotated[
        float, Meta(description="ask a standby as well when the owner has not answered in this time; 0: never", ge=0)
    ] = 50.0

    speculative_ttl_ms: Annotated[
        float, Meta(description="how long a decision vouches for blocks that no event has shown", ge=0)
    ] = 5_000.0
    outcome_delay_ms: Annotated[
        float, Meta(description="compare a decision with the index after this time; 0: never", ge=0)
    ] = 10_000.0

    tls_certfile: Annotated[str, Meta(description="server certificate chain (PEM); turns TLS on")] = ""
    tls_keyfile: Annotated[str, Meta(description="key of the server certificate (PEM)")] = ""
    tls_client_cafile: Annotated[str, Meta(description="CA of client certificates (PEM); turns mutual TLS on")] = ""
    tokens_file: Annotated[
        str,
        Meta(description="TOML file of bearer tokens with their roles and tenants; empty: no tokens are asked for"),
    ] = ""
    worker_tls_cafile: Annotated[
        str, Meta(description="CA of the workers' lookup service (PEM); empty: plain connections")
    ] = ""

    traces_endpoint: Annotated[
        str,
        Meta(
            description="send OpenTelemetry traces to this OTLP/gRPC address, http://HOST:4317 or https://...; "
            "empty: none; needs kvatlas[otel]"
        ),
    ] = ""
    traces_sample_ratio: Annotated[
        float, Meta(description="share of the requests traced where the caller has not decided it", ge=0, le=1)
    ] = 1.0

    max_message_bytes: Annotated[int, Meta(description="largest request", ge=1024, le=1024 * MIB)] = 16 * MIB
    max_prompt_bytes: Annotated[int, Meta(description="longest prompt or chat, in bytes of text", ge=1)] = 4 * MIB
    max_tokens: Annotated[int, Meta(description="longest prompt, in tokens", ge=1)] = 1_048_576
    max_concurrent: Annotated[int, Meta(description="requests worked on at once; more are refused", ge=1)] = 512

    def __post_init__(self) -> None:
        """Check settings against each other.

        Raises:
            ValueError: two settings contradict each other.
        """
        if bool(self.tls_certfile) != bool(self.tls_keyfile):
            raise ValueError("tls_certfile and tls_keyfile go together")
        if self.tls_client_cafile and not self.tls_certfile:
            raise ValueError("tls_client_cafile needs tls_certfile: mutual TLS is TLS first")
