"""Settings of the bridge."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.runtime.settings import Section


class BridgeSettings(Section, frozen=True, kw_only=True):
    """The bridge."""

    engines: Annotated[
        list[str],
        Meta(
            description="engine endpoint: http://HOST:PORT of its API, which tells the rest, or "
            "tcp://HOST:PORT[,tcp://HOST:REPLAY][,pod=NAME][,model=NAME]"
            "[,engine=vllm|sglang|tensorrt-llm][,dp=N][,store=NAME][,announcements=auto|copies|presence][,blocks_per_chunk=N]"
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
    kubernetes_annotations: Annotated[
        str,
        Meta(
            description="prefix of the annotations port, replay-port, http-port, model, engine, dp, store, "
            "announcements, blocks-per-chunk"
        ),
    ] = "kvatlas.io/"
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
    bind_pods: Annotated[int, Meta(description="pods at most that may connect to us", ge=1)] = 10_000
    discovery_seconds: Annotated[
        float, Meta(description="how often names are looked up and engines asked over HTTP", gt=0)
    ] = 5.0
    ownership: Annotated[
        Literal["group", "all"],
        Meta(description="group: bridges share pods out through a consumer group; all: this bridge takes every pod"),
    ] = "group"
    group: Annotated[str, Meta(description="consumer group of the bridges")] = "kvatlas-bridge"
    session_timeout_seconds: Annotated[
        float, Meta(description="a bridge silent this long loses its pods to another", ge=1)
    ] = 10.0
    topic_filter: Annotated[str, Meta(description="subscribe to engine topics with this prefix")] = ""
    receive_hwm: Annotated[int, Meta(description="messages ZMQ queues per engine socket", ge=1)] = 100_000
    replay_timeout_seconds: Annotated[float, Meta(description="silence that ends one try of a replay", gt=0)] = 3.0
    replay_tries: Annotated[
        int, Meta(description="tries without progress before what is missing is recorded as lost", ge=1)
    ] = 3
    replay_backoff_seconds: Annotated[float, Meta(description="wait before the next try", ge=0)] = 0.5
    replay_parallel: Annotated[int, Meta(description="replays at a time, over all pods", ge=1)] = 8
    replay_piece: Annotated[int, Meta(description="messages read of one replay before asking again", ge=1)] = 20_000
    hold_messages: Annotated[int, Meta(description="live messages held per pod while a hole is repaired", ge=1)] = (
        20_000
    )
    hold_bytes: Annotated[int, Meta(description="bytes of them per pod", ge=1)] = 64 * 1024 * 1024
    hold_total_bytes: Annotated[
        int, Meta(description="bytes of them over all pods; beyond it live messages are left to replay", ge=1)
    ] = 512 * 1024 * 1024
    buffer_bytes: Annotated[
        int, Meta(description="bytes waiting for Kafka; beyond it live messages are left to replay", ge=1024)
    ] = 256 * 1024 * 1024
    linger_ms: Annotated[
        float, Meta(description="least time between two requests to a broker, in which messages gather", ge=0)
    ] = 2.0
    batch_bytes: Annotated[int, Meta(description="largest record batch", ge=1024)] = 1024 * 1024
    compression: Annotated[Literal["none", "lz4", "zstd", "gzip", "snappy"], Meta(description="of record batches")] = (
        "zstd"
    )
    flush_seconds: Annotated[float, Meta(description="longest wait for Kafka at shutdown", ge=0)] = 10.0
    heartbeat_seconds: Annotated[
        float, Meta(description="silence after which a pod's replay socket is asked for its tail", gt=0)
    ] = 10.0
    stale_seconds: Annotated[float, Meta(description="silence after which a pod is marked stale", gt=0)] = 60.0
    gone_seconds: Annotated[
        float, Meta(description="time after which a pod that discovery no longer lists is marked gone", ge=0)
    ] = 30.0
    record_seconds: Annotated[float, Meta(description="how often changed pod records are written", gt=0)] = 1.0
    message_bytes: Annotated[int, Meta(description="largest message that is forwarded", ge=1024)] = 16 * 1024 * 1024
    socket_message_bytes: Annotated[
        int, Meta(description="ZMQ drops a peer that sends a larger message; -1 for no limit")
    ] = 512 * 1024 * 1024
    strip_tokens: Annotated[
        bool, Meta(description="store no token ids: the bridge computes the block keys and forwards those")
    ] = False
    strip_blocks: Annotated[
        int, Meta(description="engine blocks per pod whose keys are remembered, for children that follow", ge=1)
    ] = 65_536
    strip_recover_records: Annotated[
        int, Meta(description="records per partition read back at start to learn known blocks", ge=0)
    ] = 50_000
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
    lmcache_chunks: Annotated[
        int, Meta(description="chunks remembered per LMCache server, and tokens of as many in all", ge=1)
    ] = 65_536
    listen: Annotated[str, Meta(description="host:port of /metrics, /healthz, /readyz; empty switches it off")] = ""

    def limits(self) -> Limits:
        """Return the bounds on what one message may hold."""
        return Limits(message_bytes=self.message_bytes)
