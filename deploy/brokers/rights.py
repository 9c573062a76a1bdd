"""Which account needs which right on Kafka, and whether it has them, asked before a service starts.

The table here is the one in docs/security.md. Kafka tells an account what it may do (``authorized operations`` of
Metadata and DescribeGroups), so all that is missing is known at once and by name, where a service by itself would
meet it one refused request at a time.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.types import Array, Boolean, Bytes, Int16, Int32, Schema, String

from kvatlas.bridge.errors import RightsError, SettingsError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import is_embedded
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.numbers import port_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.errors import BrokerUnavailableError

#: Kafka's numbers of the operations that we need; an authorized-operations field has one bit for each.
OPERATIONS: Final = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10}

_TIMEOUT_MS: Final = 15_000
_RETRY_SECONDS: Final = 1.0
#: How long services wait for a broker at their start.
START_SECONDS: Final = 30.0

#: A broker says this where it was not asked, or does not know the field.
_NOT_TOLD: Final = -(1 << 31)


log = logging.getLogger(__name__)


class Right(NamedTuple):
    """Operations on one topic or group, by its full name."""

    kind: str
    name: str
    operations: tuple[str, ...]

    def __str__(self) -> str:
        """Return it as errors and the documentation say it."""
        return f"{' and '.join(self.operations)} on {self.kind} {self.name}"


#: Service or tool -> topic (``engine_blocks``, ``block_index``: the changelogs) -> operations.
TOPIC_RIGHTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "bridge": {topics.EVENTS: ("Read", "Write"), topics.DLQ: ("Write",), topics.PODS: ("Read", "Write")},
    "worker": {
        topics.EVENTS: ("Read",),
        topics.DLQ: ("Write",),
        topics.PODS: ("Read", "Write"),
        topics.BLOCKS: ("Read", "Write"),
        topics.WORKERS: ("Read", "Write"),
        topics.DECISIONS: ("Write",),
        "engine_blocks": ("Read", "Write"),
        "block_index": ("Read", "Write"),
    },
    "scorer": {topics.PODS: ("Read",), topics.WORKERS: ("Read",), topics.DECISIONS: ("Read", "Write")},
    "mirror": {topics.PODS: ("Read",), "block_index": ("Read",)},
    "top": {topics.PODS: ("Read",), topics.WORKERS: ("Read",), topics.BLOCKS: ("Describe",)},
    "audit": {
        topics.EVENTS: ("Read",),
        topics.PODS: ("Read",),
        topics.WORKERS: ("Read",),
        "block_index": ("Read",),
    },
    "replay": {topic.name: ("Read",) for topic in topics.TOPICS},
    "at": {topics.EVENTS: ("Read",)},
    "diff": {topics.EVENTS: ("Read",)},
    "why": {topics.EVENTS: ("Read",), topics.DECISIONS: ("Read",)},
    "whatif": {topics.DECISIONS: ("Read",)},
    "console": {
        **dict.fromkeys((topics.EVENTS, topics.PODS, topics.WORKERS, topics.DECISIONS, topics.DLQ), ("Read",)),
        topics.BLOCKS: ("Describe",),
    },
    "topics": dict.fromkeys(
        (*(topic.name for topic in topics.TOPICS), "engine_blocks", "block_index"),
        ("Create", "Describe", "DescribeConfigs"),
    ),
}


def rights_of(
    who: str,
    kafka: KafkaSettings,
    *,
    app: str = "kvatlas",
    version: str = topics.BASE_VERSION,
    groups: Sequence[str] = (),
) -> list[Right]:
    """Return what a service or tool needs.

    Args:
        who: a key of :data:`TOPIC_RIGHTS`.
        kafka: for the topic prefix.
        app: the workers' app, which their changelogs carry.
        version: index version of a worker.
        groups: consumer groups that it joins, without the prefix.
    """
    engine, index, blocks = (topic.name for topic in topics.version_topics(app, version))
    names = {"engine_blocks": engine, "block_index": index, topics.BLOCKS: blocks}
    wanted = [
        Right("topic", kafka.topic(names.get(name, name)), operations) for name, operations in TOPIC_RIGHTS[who].items()
    ]
    return wanted + [Right("group", kafka.topic(group), ("Read",)) for group in groups]


def default_groups(who: str, app: str = "kvatlas") -> list[str]:
    """Return the consumer groups that a service joins unless its settings name others."""
    return {"bridge": ["kvatlas-bridge"], "worker": [app], "mirror": [f"{app}-mirror-kvatlas"]}.get(who, [])


async def check_rights(kafka: KafkaSettings, rights: Iterable[Right], *, wait_seconds: float = 0.0) -> None:
    """Connect as a service would, and ask Kafka what the account may do.

    Topics that do not exist are left to :func:`~kvatlas.deploy.brokers.topics.ensure_topics`. A broker that is too
    old to tell (before Apache Kafka 2.3) or is the embedded one is taken at its word when it refuses later.

    Args:
        kafka: how to reach the brokers.
        rights: what the account needs.
        wait_seconds: how long to wait for a first broker that answers; brokers and services may start together.

    Raises:
        SettingsError: the TLS or SASL settings are refused; names the setting.
        BrokerUnavailableError: no broker answers.
        RightsError: the account lacks rights; names all of them.
    """
    wanted = list(rights)
    connection = await _awaited(kafka, wait_seconds)
    try:
        missing = await _missing_topics(connection, [right for right in wanted if right.kind == "topic"])
        if missing is None:
            return
        for right in wanted:
            if right.kind == "group":
                missing += await _missing_group(connection, kafka, right)
    except NotImplementedError:  # aiokafka's word for: the broker does not know this version of the request
        return
    except KafkaError as error:
        raise BrokerUnavailableError(f"{kafka.brokers} stopped answering: {error!r}") from error
    finally:
        connection.close()
    if missing:
        lacking = "; ".join(map(str, missing))
        raise RightsError(
            f"{account(kafka)} has too few rights on {kafka.brokers}: it lacks {lacking}. "
            "docs/security.md has the table of rights, `kvatlas topics --acls` the commands that give them"
        )


async def _awaited(kafka: KafkaSettings, wait_seconds: float) -> AIOKafkaConnection:
    deadline = time.monotonic() + wait_seconds
    told = False
    while True:
        try:
            return await contact(kafka)
        except BrokerUnavailableError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
            if not told:
                log.warning("%s; trying again for %g s", error, wait_seconds)
            told = True
            await asyncio.sleep(_RETRY_SECONDS)


def account(kafka: KafkaSettings) -> str:
    """Name the account that the settings log in with."""
    if kafka.security_protocol.startswith("SASL"):
        return f"Kafka account {kafka.sasl_username!r}"
    return f"client certificate {kafka.ssl_certfile}" if kafka.ssl_certfile else "the anonymous account"


async def contact(kafka: KafkaSettings) -> AIOKafkaConnection:
    """Connect to the first bootstrap server that answers.

    aiokafka's clients log the reason of a failure and raise another one; this raises the reason.

    Raises:
        SettingsError: an address is no address, or TLS or SASL is refused.
        BrokerUnavailableError: nobody answers at any address.
    """
    config = client_config(kafka, "kvatlas-check")
    reasons = []
    for address in config.pop("bootstrap_servers").split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or (number := port_of(port)) is None:
            raise SettingsError(f"[kafka] brokers {kafka.brokers!r}: {address.strip()!r} is not host:port")
        try:
            return await create_conn(host.strip("[]"), number, request_timeout_ms=_TIMEOUT_MS, **config)
        except (KafkaError, OSError, TimeoutError) as error:
            if (refusal := _refusal(kafka, address.strip(), error)) is not None:
                raise refusal from error
            reasons.append(f"{address.strip()}: {error or 'no answer in time'}")
    raise BrokerUnavailableError(
        f"no broker answers at {kafka.brokers} ({'; '.join(reasons)}); check [kafka] brokers and security_protocol, "
        "or start one with `kvatlas broker start`"
    )


def _refusal(kafka: KafkaSettings, address: str, error: BaseException) -> SettingsError | None:
    """Return what a failed connection says of the settings; None where it says nothing of them."""
    if isinstance(error, ssl.SSLCertVerificationError):
        given = f"ssl_cafile {kafka.ssl_cafile}" if kafka.ssl_cafile else "ssl_cafile is not set and the machine's CAs"
        return SettingsError(
            f"[kafka] {given} did not sign the certificate of {address}: {error.verify_message or error.reason}"
        )
    if isinstance(error, ssl.SSLError):
        return SettingsError(
            f"[kafka] security_protocol {kafka.security_protocol}: {address} does not speak TLS with us "
            f"({error.reason}); is it the TLS port, and does it ask for a client certificate (ssl_certfile)?"
        )
    if isinstance(error, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return SettingsError(
            f"[kafka] sasl_mechanism {kafka.sasl_mechanism}, security_protocol {kafka.security_protocol}: "
            f"{address} refuses them: {error}"
        )
    if isinstance(error, SaslAuthenticationFailed):
        source = f"sasl_password_file {kafka.sasl_password_file}" if kafka.sasl_password_file else "sasl_password"
        return SettingsError(
            f"[kafka] sasl_username {kafka.sasl_username!r} with {source} and sasl_mechanism {kafka.sasl_mechanism}: "
            f"{address} refuses them: {error}"
        )
    return None


async def _missing_topics(connection: AIOKafkaConnection, rights: list[Right]) -> list[Right] | None:
    """Return what is missing; None where the broker does not tell."""
    reply = (await connection.send(_MetadataRequest([right.name for right in rights]))).to_object()
    if is_embedded(reply):
        return None
    told = {topic["topic"]: topic for topic in reply["topics"]}
    missing = []
    for right in rights:
        topic = told[right.name]
        if topic["error_code"] == TopicAuthorizationFailedError.errno:
            missing.append(right)
        elif topic["error_code"] == 0:
            missing += lacking(right, topic["authorized_operations"])
    return missing


async def _missing_group(connection: AIOKafkaConnection, kafka: KafkaSettings, right: Right) -> list[Right]:
    found = await connection.send(FindCoordinatorRequest(right.name, 0))
    if found.error_code == GroupAuthorizationFailedError.errno:
        return [right]
    if found.error_code:  # a fresh cluster has no coordinator before the first group
        return []
    config = client_config(kafka, "kvatlas-check")
    del config["bootstrap_servers"]
    coordinator = await create_conn(found.host, found.port, request_timeout_ms=_TIMEOUT_MS, **config)
    try:
        reply = (await coordinator.send(_GroupsRequest([right.name]))).to_object()
    finally:
        coordinator.close()
    group = reply["groups"][0]
    if group["error_code"] == GroupAuthorizationFailedError.errno:
        return [right]
    return [] if group["error_code"] else lacking(right, group["authorized_operations"])


def lacking(right: Right, bits: int) -> list[Right]:
    """Return what a right lacks, from the authorized-operations field; nothing where the broker did not tell."""
    if bits == _NOT_TOLD:
        return []
    absent = tuple(name for name in right.operations if not bits >> OPERATIONS[name] & 1)
    return [right._replace(operations=absent)] if absent else []


# --- the two requests in the versions that tell rights: Kafka protocol guide, Metadata v8 and DescribeGroups v3 ---


class _MetadataResponse8(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", Array(("node_id", Int32), ("host", String()), ("port", Int32), ("rack", String()))),
        ("cluster_id", String()),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", String()),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _MetadataRequest8(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _MetadataResponse8
    SCHEMA = Schema(
        ("topics", Array(String())),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _MetadataRequest(Request[_MetadataRequest8]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: type[_MetadataRequest8]) -> Any:
        return request_struct_class(self._topics, False, False, True)


class _GroupsResponse3(Response):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "groups",
            Array(
                ("error_code", Int16),
                ("group", String()),
                ("state", String()),
                ("protocol_type", String()),
                ("protocol", String()),
                (
                    "members",
                    Array(
                        ("member_id", String()),
                        ("client_id", String()),
                        ("client_host", String()),
                        ("metadata", Bytes),
                        ("assignment", Bytes),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
    )


class _GroupsRequest3(RequestStruct):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 3
    RESPONSE_TYPE = _GroupsResponse3
    SCHEMA = Schema(("groups", Array(String())), ("include_authorized_operations", Boolean))


class _GroupsRequest(Request[_GroupsRequest3]):  # type: ignore[misc]
    API_KEY = 15

    def __init__(self, groups: list[str]) -> None:
        self._groups = groups

    def build(self, request_struct_class: type[_GroupsRequest3]) -> Any:
        return request_struct_class(self._groups, True)
