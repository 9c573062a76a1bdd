"""Envoy's configuration as a document: what a gateway of every kind must say."""

from __future__ import annotations

import pytest

from kvatlas.deploy.gateway.config import KINDS, GatewayOptions, Kind, document


@pytest.mark.parametrize("kind", KINDS)
def test_the_picker_gets_its_time_in_every_kind(kind: Kind) -> None:
    """Envoy's own limit of 200 ms would turn a slow answer about response headers into a 504 for the client."""
    made = document(GatewayOptions(kind=kind, pickers=["127.0.0.1:1"], pods=["127.0.0.1:2"], picker_timeout_ms=1_500))
    chain = made["static_resources"]["listeners"][0]["filter_chains"][0]
    filters = chain["filters"][0]["typed_config"]["http_filters"]
    (processor,) = (one for one in filters if one["name"] == "envoy.filters.http.ext_proc")
    assert processor["typed_config"]["message_timeout"] == "1.5s"


def test_answers_name_who_gave_them_where_that_is_asked_for() -> None:
    """The header is set from the address that Envoy's connection goes to."""
    options = GatewayOptions(pickers=["127.0.0.1:1"], pods=["127.0.0.1:2"], served_header="x-served")
    chain = document(options)["static_resources"]["listeners"][0]["filter_chains"][0]
    (host,) = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert host["response_headers_to_add"] == [{"header": {"key": "x-served", "value": "%UPSTREAM_REMOTE_ADDRESS%"}}]
