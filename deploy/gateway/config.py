"""Envoy configuration for a picker, as a plain document: one listener, the processor filter, the pods. Pure.

The kinds differ in how the body reaches the picker and how the pod is named:

================  ==================  ==================================  =======================
kind              body mode           pods                                picker is away
================  ==================  ==================================  =======================
``full-duplex``   full duplex         by header, any address              503
``override``      full duplex         members, from metadata, 2 retries   round robin
``buffered``      buffered            members, from metadata, 2 retries   round robin
``streamed``      streamed at once    members, from metadata, 2 retries   round robin
================  ==================  ==================================  =======================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import port_of
from kvatlas.scorer.api.extproc import SERVICE
from kvatlas.scorer.picker import names

KINDS: Final = ("full-duplex", "override", "buffered", "streamed")
Kind = Literal["full-duplex", "override", "buffered", "streamed"]

_TYPE: Final = "type.googleapis.com/"
_HTTP_FILTERS: Final = _TYPE + "envoy.extensions.filters.http."
_MANY: Final = {
    "max_connections": 10_000,
    "max_pending_requests": 10_000,
    "max_requests": 100_000,
    "max_retries": 1_000,
}
_BODY_MODES: Final = {
    "full-duplex": "FULL_DUPLEX_STREAMED",
    "override": "FULL_DUPLEX_STREAMED",
    "buffered": "BUFFERED",
    "streamed": "STREAMED",
}


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to configure.

    Attributes:
        kind: one of :data:`KINDS`.
        pickers: ``host:port`` of each picker process; streams are spread evenly over them.
        pods: ``host:port`` of the pods; not needed by ``full-duplex``.
        listen: ``host:port`` that clients use; port 0 takes a free one.
        admin: ``host:port`` of Envoy's own pages.
        observe: a second filter that shows responses to the picker without waiting for it. Without, the response's
            headers wait for the picker, for status, served pod and the request's end.
        response_body: pass the response's body through the picker; only to measure or where nothing else works.
        buffer_bytes: largest buffered body; larger ones are refused (413).
        picker_timeout_ms: longest wait for an answer of the picker, where Envoy has one.
        cafile: CA of the picker's certificate; empty: plaintext.
        server_name: name in that certificate.
        served_header: response header that names the address that answered; empty for none.
    """

    kind: Kind = "override"
    pickers: Sequence[str] = ()
    pods: Sequence[str] = ()
    listen: str = "127.0.0.1:0"
    admin: str = "127.0.0.1:0"
    observe: bool = False
    response_body: bool = False
    buffer_bytes: int = 16 * 1024 * 1024
    picker_timeout_ms: int = 2_000
    cafile: str = ""
    server_name: str = ""
    served_header: str = ""


def document(options: GatewayOptions) -> dict[str, Any]:
    """Return the configuration.

    Raises:
        SettingsError: an address is not ``host:port``, there are no pods where members are needed, or no pickers.
    """
    if options.kind not in KINDS:
        raise SettingsError(f"gateway kind {options.kind!r}: known are {', '.join(KINDS)}")
    if not options.pods and options.kind != "full-duplex":
        raise SettingsError(f"gateway kind {options.kind!r} needs the pods' addresses (--pod HOST:PORT)")
    clusters = [_picker(options), _dialled() if options.kind == "full-duplex" else _members(options.pods)]
    return {
        "admin": {"address": _address(options.admin)},
        "static_resources": {"listeners": [_listener(options)], "clusters": clusters},
    }


def plain(options: GatewayOptions) -> dict[str, Any]:
    """Return a configuration without any picker: the pods in turn. What a picker's cost is measured against."""
    cluster: dict[str, Any] = {
        "name": "pods",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [_MANY]},
        "load_assignment": _endpoints("pods", options.pods),
    }
    listener = _listener(options, filters=[_router()])
    return {
        "admin": {"address": _address(options.admin)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


def _address(text: str) -> dict[str, Any]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or (number := port_of(port)) is None:
        raise SettingsError(f"gateway address {text!r}: expected HOST:PORT")
    return {"socket_address": {"address": host.strip("[]"), "port_value": number}}


def _listener(options: GatewayOptions, filters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    direct = options.kind == "full-duplex" and filters is None
    route: dict[str, Any] = {"cluster": "picked" if direct else "pods", "timeout": "0s"}
    if not direct:
        route["retry_policy"] = {"retry_on": "connect-failure,refused-stream", "num_retries": 2}
    host: dict[str, Any] = {
        "name": "inference",
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "route": route}],
    }
    if options.served_header:
        named = {"key": options.served_header, "value": "%UPSTREAM_REMOTE_ADDRESS%"}
        host["response_headers_to_add"] = [{"header": named}]
    manager = {
        "@type": _TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inference",
        "preserve_external_request_id": True,  # keep a client's x-request-id; without one Envoy makes it
        "stream_idle_timeout": "300s",  # a model may be silent for minutes before the first token
        "route_config": {"virtual_hosts": [host]},
        "http_filters": filters if filters is not None else _filters(options),
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": "inference",
        "address": _address(options.listen),
        # Buffered bodies above it are refused; in full duplex it only paces, and bounds one message to the picker.
        "per_connection_buffer_limit_bytes": options.buffer_bytes,
        "filter_chains": [chain],
    }


def _filters(options: GatewayOptions) -> list[dict[str, Any]]:
    found = [_own_header_only(), _processor(options)]
    if options.observe:
        found.append(_observer())
    return [*found, _router()]


def _own_header_only() -> dict[str, Any]:
    """Only the picker names the pod: what a client sent goes before the picker runs."""
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": {
            "@type": _HTTP_FILTERS + "header_mutation.v3.HeaderMutation",
            "mutations": {"request_mutations": [{"remove": names.DESTINATION}]},
        },
    }


def _router() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": _HTTP_FILTERS + "router.v3.Router"},
    }


def _processor(options: GatewayOptions) -> dict[str, Any]:
    full_duplex = _BODY_MODES[options.kind] == "FULL_DUPLEX_STREAMED"
    response_body = "NONE"
    if options.response_body:
        response_body = "FULL_DUPLEX_STREAMED" if full_duplex else "STREAMED"
    headers = options.response_body or not options.observe  # what is observed is not waited for as well
    mode = {
        "request_header_mode": "SEND",
        "request_body_mode": _BODY_MODES[options.kind],
        "response_header_mode": "SEND" if headers else "SKIP",
        "response_body_mode": response_body,
    }
    if options.kind != "buffered":
        mode["request_trailer_mode"] = "SEND"  # demanded in full duplex; streamed requests with trailers hang without
    if full_duplex and options.response_body:
        mode["response_trailer_mode"] = "SEND"
    config: dict[str, Any] = {
        "@type": _HTTP_FILTERS + "ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker", "authority": "picker"}},
        "failure_mode_allow": options.kind != "full-duplex",  # without a pod named there is nowhere to go
        "status_on_error": {"code": 503},
        "processing_mode": mode,
        "response_attributes": [names.UPSTREAM_ADDRESS],
        "metadata_options": {
            "forwarding_namespaces": {"untyped": [names.SUBSET_NAMESPACE, names.LB_NAMESPACE]},
            "receiving_namespaces": {"untyped": [names.LB_NAMESPACE]},
        },
    }
    # In full duplex it is for the response's headers alone; Envoy's own is 200 ms, after which the client gets a 504.
    config["message_timeout"] = f"{options.picker_timeout_ms / 1000:g}s"
    if options.kind == "streamed":
        config["send_body_without_waiting_for_header_response"] = True
    return {"name": "envoy.filters.http.ext_proc", "typed_config": config}


def _observer() -> dict[str, Any]:
    """A filter that shows responses without waiting: nothing that happens to its stream reaches the client."""
    return {
        "name": "kvatlas.observer",
        "typed_config": {
            "@type": _HTTP_FILTERS + "ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "picker", "authority": "picker"}},
            "observability_mode": True,
            "failure_mode_allow": True,
            "processing_mode": {
                "request_header_mode": "SKIP",
                "request_body_mode": "NONE",
                "response_header_mode": "SEND",
                "response_body_mode": "STREAMED",
            },
            "response_attributes": [names.ATTRIBUTE_REQUEST_ID, names.UPSTREAM_ADDRESS],
            "metadata_options": {"forwarding_namespaces": {"untyped": [names.LB_NAMESPACE]}},
        },
    }


def _picker(options: GatewayOptions) -> dict[str, Any]:
    if not options.pickers:
        raise SettingsError("gateway: no picker (--picker HOST:PORT)")
    cluster: dict[str, Any] = {
        "name": "picker",
        "type": "STRICT_DNS" if any(not _numeric(one) for one in options.pickers) else "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "circuit_breakers": {"thresholds": [_MANY]},
        # Known to be away before a body is sent: only then can full duplex fail open.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": SERVICE},
            }
        ],
        "load_assignment": _endpoints("picker", options.pickers),
    }
    if options.cafile:
        cluster["transport_socket"] = _tls(options)
    return cluster


def _tls(options: GatewayOptions) -> dict[str, Any]:
    name = options.server_name or "localhost"
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": name,
            "common_tls_context": {
                "alpn_protocols": ["h2"],  # gRPC closes a connection that has not agreed on it
                "validation_context": {
                    "trusted_ca": {"filename": options.cafile},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": name}}],
                },
            },
        },
    }


def _dialled() -> dict[str, Any]:
    """A cluster that dials whatever address the header names: exactly one, so there is no second try."""
    return {
        "name": "picked",
        "type": "ORIGINAL_DST",
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "circuit_breakers": {"thresholds": [_MANY]},
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": names.DESTINATION},
    }


def _members(pods: Sequence[str]) -> dict[str, Any]:
    """A cluster that takes the picker's list in order over its retries, among its members alone."""
    key = names.LB_NAMESPACE
    fallback = {
        "name": "envoy.load_balancing_policies.round_robin",
        "typed_config": {"@type": _TYPE + "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"},
    }
    override = {
        "@type": _TYPE + "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": {"key": key, "path": [{"key": names.DESTINATION}]}}],
        "selected_host_key": {"key": key, "path": [{"key": names.SERVED}]},
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    policy = {"name": "envoy.load_balancing_policies.override_host", "typed_config": override}
    return {
        "name": "pods",
        "type": "STRICT_DNS" if any(not _numeric(pod) for pod in pods) else "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [_MANY]},
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        "load_assignment": _endpoints("pods", pods),
    }


def _numeric(address: str) -> bool:
    return address.rpartition(":")[0].strip("[]").replace(".", "").replace(":", "").isalnum() and (
        address[0].isdecimal() or address[0] == "["
    )


def _endpoints(cluster: str, addresses: Sequence[str]) -> dict[str, Any]:
    return {
        "cluster_name": cluster,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(one)}} for one in addresses]}],
    }
