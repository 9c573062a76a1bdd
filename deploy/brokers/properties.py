"""The broker's configuration: a pure function from what we choose to Kafka's properties."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from pathlib import Path

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest record batch the node takes; an engine's message rarely passes 1 MB, a flush of a big fleet may."""

CLIENT_LISTENER = "CLIENT"
INTERNAL_LISTENER = "INTERNAL"
CONTROLLER_LISTENER = "CONTROLLER"


def node_properties(
    *,
    data_dir: Path,
    host: str,
    client_port: int,
    controller_port: int,
    internal_port: int | None,
    security: Mapping[str, str] | None,
    extra: Mapping[str, str],
) -> dict[str, str]:
    """Properties of a single node that is broker and controller.

    Args:
        data_dir: the node's folder; Kafka's logs go below it.
        host: address that clients connect to.
        client_port: port of the client listener.
        controller_port: port of the controller listener, on the loopback.
        internal_port: port of the node's listener to itself; None where the client listener serves (plain nodes).
        security: properties of TLS and SCRAM; None for a plain node.
        extra: properties that win over all of these.
    """
    secured = security is not None
    listeners = {CLIENT_LISTENER: f"{host}:{client_port}"}
    if internal_port is not None:
        listeners[INTERNAL_LISTENER] = f"127.0.0.1:{internal_port}"
    advertised = ",".join(f"{name}://{address}" for name, address in listeners.items())
    protocols = {
        CLIENT_LISTENER: "SASL_SSL" if secured else "PLAINTEXT",
        INTERNAL_LISTENER: "SSL" if secured else "PLAINTEXT",
        CONTROLLER_LISTENER: "SSL" if secured else "PLAINTEXT",
    }
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        # A static voter: unlike a recorded one it lets the controller's port change between starts.
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"{advertised},{CONTROLLER_LISTENER}://127.0.0.1:{controller_port}",
        "advertised.listeners": advertised,
        "controller.listener.names": CONTROLLER_LISTENER,
        "inter.broker.listener.name": INTERNAL_LISTENER if internal_port is not None else CLIENT_LISTENER,
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
        "log.dirs": str(data_dir / "data"),
        # Topics are made by us, from one table; one that appears by a typing error is a bug that hides.
        "auto.create.topics.enable": "false",
        "num.partitions": "4",
        "default.replication.factor": "1",
        **_internal_topics(),
        # One node has nobody to wait for: groups form at once, and tests may use short sessions.
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        # A killed node may come back only once its old session has ended: the default is 9 s.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "message.max.bytes": str(MAX_MESSAGE_BYTES),
        "replica.fetch.max.bytes": str(MAX_MESSAGE_BYTES),
        # The default cleaner buffer is 128 MB of heap, a quarter of ours.
        "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
        "log.segment.bytes": str(256 * 1024 * 1024),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "background.threads": "2",
        "controlled.shutdown.enable": "true",
        **(security or {}),
        **extra,
    }


def _internal_topics() -> dict[str, str]:
    """One replica, few partitions: each costs open files and start time."""
    return {
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
    }


def render(properties: Mapping[str, str]) -> str:
    """The text of a Java properties file, keys sorted, values escaped."""
    return "".join(f"{_escape(key)}={_escape(value)}\n" for key, value in sorted(properties.items()))


def _escape(text: str) -> str:
    replaced = text.replace("\\", "\\\\").replace("\n", "\\n").replace("=", "\\=").replace(":", "\\:")
    return replaced.replace("#", "\\#").replace("!", "\\!").replace(" ", "\\ ")


def new_cluster_id() -> str:
    """A random Kafka cluster id: 16 bytes, URL-safe base64 without padding."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # A leading dash reads as an option on the formatter's command line.
        if not text.startswith("-"):
            return text
