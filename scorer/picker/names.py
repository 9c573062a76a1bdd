"""Header and metadata names of the endpoint picker protocol (Gateway API Inference Extension) and of llm-d.

Each name is written here once: the front that answers Envoy, the configuration writer and the tests read them here.
"""

from __future__ import annotations

from typing import Final

#: The chosen pod, ``ip:port`` or a list of them, best first: request header and metadata of namespace ``envoy.lb``.
DESTINATION: Final = "x-gateway-destination-endpoint"
#: The pod that answered, where the data plane reports it: metadata of namespace ``envoy.lb`` on responses.
SERVED: Final = "x-gateway-destination-endpoint-served"
#: Endpoints to choose among: metadata of namespace ``envoy.lb.subset_hint``.
SUBSET: Final = "x-gateway-destination-endpoint-subset"
LB_NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"

REQUEST_ID: Final = "x-request-id"
#: Why a request was refused, on the refusal.
DROPPED_REASON: Final = "x-llm-d-request-dropped-reason"
#: The pod that computes the prompt, for the sidecar of the pod that decodes.
PREFILL: Final = "x-prefiller-host-port"
#: A pod to pull cached blocks from, and how many tokens that gains.
PEER_SOURCE: Final = "x-kv-cache-source-host-port"
PEER_TOKENS: Final = "x-kvatlas-source-tokens"

#: What a request is for: some of it is refused before the rest.
OBJECTIVES: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")

#: Headers that name a client's session; the first one present counts.
SESSIONS: Final = ("x-session-id", "x-session-affinity", "session-id", "session_id")

#: Attributes that Envoy sends when told to: the pod's address, and the request's id where its headers are not sent.
ATTRIBUTES: Final = "envoy.filters.http.ext_proc"
UPSTREAM_ADDRESS: Final = "upstream.address"
ATTRIBUTE_REQUEST_ID: Final = "request.id"

#: What a client may not decide: removed from every request that goes on.
CONTROL: Final = (
    SERVED,
    SUBSET,
    DROPPED_REASON,
    PREFILL,
    "x-encoder-hosts-ports",
    PEER_SOURCE,
    PEER_TOKENS,
    "x-data-parallel-host-port",
    "x-gateway-destination-endpoint-scores",
    *OBJECTIVES,
    "x-gateway-inference-fairness-id",
    "x-llm-d-inference-fairness-id",
    "x-gateway-model-name-rewrite",
    "x-llm-d-model-name-rewrite",
    "x-slo-ttft-ms",
    "x-slo-tpot-ms",
    "x-llm-d-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
)
