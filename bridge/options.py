"""Settings of the bridge."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.runtime.settings import Section


class BridgeSettings(Section, frozen=True, kw_only=True):
    """The bridge."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "batch_bytes", "bind_pods", "discovery_seconds", "flush_seconds", "hold_bytes", "hold_messages",
        "hold_total_bytes", "kubernetes_annotations", "linger_ms", "lmcache_chunks", "receive_hwm",
        "record_seconds", "replay_backoff_seconds", "replay_parallel", "replay_piece", "replay_tries",
        "socket_message_bytes", "strip_blocks", "strip_recover_records", "topic_filter",
    ))  # fmt: skip

    engines: Annotated[
        list[str],
        Meta(
            description="engine endpoint: http://HOST:PORT of its API, which tells the rest, or "
            "tcp://HOST:PORT[,tcp://HOST:REPLAY][,pod=NAME][,model=NAME]"
            "[,engine=vllm|sglang|tensorrt-llm][,dp=N][,store=NAME][,announcements=auto|copies|presence][,blocks_per_chunk=N]"
            "[,speculation=METHOD][,metrics=URL][,load=tcp://HOST:PORT]"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it
    engines_file: Annotated[str, Meta(description="TOML, YAML or JSON file of endpoints, watched for changes")] = ""
    dns: Annotated[
        list[str],
        Meta(
            description="name with one A (or AAAA) record per pod, as an endpoint: tcp://NAME:PORT[,tcp://NAME:REPLAY][,...]"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it
    kubernetes_selector: Annotated[
        str, Meta(description="label selector of the pods that run engines; empty: no discovery from Kubernetes")
    ] = ""
    kubernetes_namespace: Annotated[str, Meta(description="their namespace; empty: all")] = ""
    kubernetes_config: Annotated[str, Meta(description="kubeconfig file; empty: the pod's own service account")] = ""
    kubernetes_port: Annotated[int, Meta(description="live port without annotation", ge=1, le=65535)] = 5557
    kubernetes_replay_port: Annotated[
        int, Meta(description="replay port without annotation; 0 for none", ge=0, le=65535)
    ] = 5558
    kubernetes_http_port: Annotated[
        int,
        Meta(
            description="port of the pods' HTTP API, which is asked where they publish; 0: the ports above, unless a "
            "pod's annotation http-port says otherwise",
            ge=0,
            le=65535,
        ),
    ] = 0
    bind: Annotated[
        list[str],
        Meta(
            description="address where engines connect to us: tcp://*:PORT[,replay_port=PORT][,model=NAME]"
            "[,engine=NAME][,store=NAME]; needs ownership=all"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it
    ownership: Annotated[
        Literal["group", "all"],
        Meta(description="group: bridges share pods out through a consumer group; all: this bridge takes every pod"),
    ] = "group"
    group: Annotated[str, Meta(description="consumer group of the bridges")] = "kvatlas-bridge"
    session_timeout_seconds: Annotated[
        float, Meta(description="a bridge silent this long loses its pods to another", ge=1)
    ] = 10.0
    replay_timeout_seconds: Annotated[float, Meta(description="silence that ends one try of a replay", gt=0)] = 3.0
    buffer_bytes: Annotated[
        int, Meta(description="bytes waiting for Kafka; beyond it live messages are left to replay", ge=1024)
    ] = 256 * 1024 * 1024
    compression: Annotated[Literal["none", "lz4", "zstd", "gzip", "snappy"], Meta(description="of record batches")] = (
        "zstd"
    )
    heartbeat_seconds: Annotated[
        float, Meta(description="silence after which a pod's replay socket is asked for its tail", gt=0)
    ] = 10.0
    stale_seconds: Annotated[float, Meta(description="silence after which a pod is marked stale", gt=0)] = 60.0
    gone_seconds: Annotated[
        float, Meta(description="time after which a pod that discovery no longer lists is marked gone", ge=0)
    ] = 30.0
    message_bytes: Annotated[int, Meta(description="largest message that is forwarded", ge=1024)] = 16 * 1024 * 1024
    strip_tokens: Annotated[
        bool, Meta(description="store no token ids: the bridge computes the block keys and forwards those")
    ] = False
    block_size_tokens: Annotated[
        int, Meta(description="tokens in a canonical block, as the workers have it; for stripped tokens", ge=1, le=4096)
    ] = 16
    lmcache_topic: Annotated[
        str, Meta(description="LMCache's event topic (lmcache-cache-events), without prefix; empty: none is read")
    ] = ""
    lmcache_servers: Annotated[
        list[str],
        Meta(description="LMCache server and the pods that load from it: INSTANCE,pod=POD[,pod=POD][,model=NAME]"),
    ] = []  # noqa: RUF012 - msgspec copies it
    mooncake_masters: Annotated[
        list[str],
        Meta(
            description="Mooncake's master and the pods that load from its pool: "
            "tcp://HOST:PORT,pod=POD[,pod=POD][,key=REGEX][,hash=first|last][,parts=N]"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it
    listen: Annotated[str, Meta(description="host:port of /metrics, /healthz, /readyz; empty switches it off")] = ""

    def limits(self) -> Limits:
        """Return the bounds on what one message may hold."""
        return Limits(message_bytes=self.message_bytes)
