"""Settings of a picker: section ``picker``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section
from kvatlas.scorer.picker.choose import Rules
from kvatlas.scorer.picker.cost import CostWeights
from kvatlas.scorer.picker.load import LoadOptions
from kvatlas.scorer.picker.roles import RoleRules


class PickerSettings(Section, frozen=True, kw_only=True):
    """How ``kvatlas picker`` decides where the gateway's next request goes."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "body_piece_bytes", "decode_tokens", "discovery_seconds", "fallbacks", "full_tokens",
        "max_body_bytes", "near_tokens", "queue_weight", "request_seconds", "session_seconds", "sessions",
        "share", "soft_usage", "stale_seconds",
    ))  # fmt: skip

    listen: Annotated[str, Meta(description="ext_proc address, host:port; port 0 takes a free one")] = "127.0.0.1:9002"
    telemetry_listen: Annotated[
        str, Meta(description="address of /metrics, /healthz and /readyz, host:port; empty: none")
    ] = ""
    name: Annotated[str, Meta(description="this picker's name in decisions; empty: host and process")] = ""
    tls_certfile: Annotated[str, Meta(description="server certificate chain (PEM); turns TLS on")] = ""
    tls_keyfile: Annotated[str, Meta(description="key of the server certificate (PEM)")] = ""
    drain_seconds: Annotated[
        float,
        Meta(description="after SIGTERM: answer the gateway, unhealthy, for so long before closing", ge=0),
    ] = 10.0

    endpoints: Annotated[
        list[str],
        Meta(
            description="serving address: HOST:PORT[,pod=NAME][,model=NAME][,role=both|prefill|decode]"
            "[,engine=vllm|sglang][,ranks=N][,metrics=URL]; rank r of a pod listens on PORT+r"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it
    endpoints_file: Annotated[
        str, Meta(description="TOML, YAML or JSON file of serving addresses, watched for changes")
    ] = ""
    dns: Annotated[
        list[str], Meta(description="name with one A record per pod, as a serving address: NAME:PORT[,model=NAME]...")
    ] = []  # noqa: RUF012 - msgspec copies it
    serving_port: Annotated[
        int,
        Meta(
            description="pods known from their events serve on this port of their host; 0: only pods whose id is "
            "HOST:PORT are taken from there",
            ge=0,
            le=65_535,
        ),
    ] = 0
    pool: Annotated[str, Meta(description="InferencePool whose pods are picked, NAMESPACE/NAME; empty: none")] = ""
    kubernetes_config: Annotated[str, Meta(description="kubeconfig file; empty: the pod's own service account")] = ""

    deadline_ms: Annotated[
        float, Meta(description="parse, tokenize and score in this time, else load alone decides", gt=0)
    ] = 150.0
    unreadable: Annotated[
        Literal["load", "refuse"],
        Meta(description="a body that cannot be read goes to a pod by load alone, or is refused (400)"),
    ] = "load"
    response: Annotated[
        Literal["off", "headers", "body"],
        Meta(
            description="what is read of responses in the stream itself; `body` costs every chunk and lets a crash of "
            "the picker cut streams: take the observing filter instead"
        ),
    ] = "headers"
    one_address: Annotated[
        bool, Meta(description="name one address only: for data planes that dial what the header says")
    ] = False

    scrape_seconds: Annotated[float, Meta(description="how often each engine's /metrics is read; 0: never", ge=0)] = (
        0.25
    )
    tokens_per_second: Annotated[
        float, Meta(description="prompt tokens that a pod computes in a second, until observation tells", gt=0)
    ] = 8_000.0

    cost_cpu: Annotated[float, Meta(description="cost of a token held in host memory", ge=0, le=1)] = 0.1
    cost_disk: Annotated[float, Meta(description="cost of a token held on the pod's disk", ge=0, le=1)] = 0.4
    cost_shared: Annotated[float, Meta(description="cost of a token in a shared store", ge=0, le=1)] = 0.5

    cold_tokens: Annotated[
        int,
        Meta(description="a prompt of which nobody holds more goes to the pod that got such a one longest ago", ge=0),
    ] = 0
    temperature_tokens: Annotated[
        float,
        Meta(
            description="pods whose costs are equal (within 64 tokens) are drawn by softmax over cost with this "
            "temperature, in prompt tokens; 0: the least cost",
            ge=0,
            le=1e9,
        ),
    ] = 0.0
    hot_tokens: Annotated[
        float,
        Meta(description="a queue longer than the shortest by more is left for the second best; 0: never", ge=0),
    ] = 128_000.0
    burst: Annotated[
        Literal["cost", "hold", "spread"],
        Meta(description="a burst of one new prefix: by cost, on one pod up to the hot limit, or spread"),
    ] = "cost"
    max_requests: Annotated[
        int, Meta(description="a pod with so many requests takes no more (429 when all have); 0: no limit", ge=0)
    ] = 0
    max_usage: Annotated[
        float,
        Meta(
            description="a pod whose KV cache is in use to this share, with a queue, takes no more; 0: no limit", ge=0
        ),
    ] = 0.0

    sheddable: Annotated[
        list[str],
        Meta(
            description="objective (x-gateway-inference-objective) whose requests are refused first (429): while the "
            "pods queue or their caches are full, on average"
        ),
    ] = []  # noqa: RUF012 - msgspec copies it

    split_prompt_tokens: Annotated[
        int, Meta(description="prompts from this length may be computed on a prefill pod", ge=0)
    ] = 0
    split_uncached_tokens: Annotated[
        int, Meta(description="... when the decode pod lacks at least so many of their tokens", ge=0)
    ] = 256
    peer_tokens: Annotated[
        int, Meta(description="name a pod to pull blocks from when that gains so many tokens; 0: never", ge=0)
    ] = 0
    peer_port: Annotated[
        int,
        Meta(
            description="port of vLLM's p2p tier (VLLM_P2P_SIDE_CHANNEL_PORT): the body's kv_transfer_params name the "
            "pod too, rank r on PORT+r; 0: the header alone",
            ge=0,
            le=65_535,
        ),
    ] = 0

    def __post_init__(self) -> None:
        """Check settings against each other.

        Raises:
            ValueError: two settings contradict each other.
        """
        if bool(self.tls_certfile) != bool(self.tls_keyfile):
            raise ValueError("tls_certfile and tls_keyfile go together")
        if self.pool and self.pool.count("/") != 1:
            raise ValueError(f"pool: {self.pool!r} is not NAMESPACE/NAME")

    def weights(self) -> CostWeights:
        """Return the weights of the cost."""
        return CostWeights(
            tiers={"gpu": 0.0, "cpu": self.cost_cpu, "disk": self.cost_disk, "shared": self.cost_shared},
        )

    def rules(self) -> Rules:
        """Return the rules of the choice."""
        return Rules(
            temperature_tokens=self.temperature_tokens,
            cold_tokens=self.cold_tokens,
            hot_tokens=self.hot_tokens,
            burst=self.burst,
            most_requests=self.max_requests,
            most_usage=self.max_usage,
            fallbacks=0 if self.one_address else Rules().fallbacks,
        )

    def load_options(self) -> LoadOptions:
        """Return how load is kept."""
        return LoadOptions(tokens_per_second=self.tokens_per_second)

    def role_rules(self) -> RoleRules:
        """Return when prompts are computed elsewhere."""
        return RoleRules(self.split_prompt_tokens, self.split_uncached_tokens, self.peer_tokens)
