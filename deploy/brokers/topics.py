"""Topics on a broker: made from the topic table, or compared with it.

Partition counts decide where every record lies, so they are compared and never changed here. The cleanup policy decides
whether a table can be restored, so it is compared as well; retention and sizes are an operator's to tune.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import is_embedded, patiently, start_client
from kvatlas.bridge.model.topics import Topic
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.errors import BrokerUnavailableError, TopicMismatchError, TopicPolicyError

_HOUR_MS: Final = 3_600_000
_POLL_SECONDS: Final = 0.05
# Compacted topics are read whole at a restore: small segments and an eager cleaner keep them near their live size.
_COMPACTED: Final = {"segment.bytes": str(64 * 1024 * 1024), "min.cleanable.dirty.ratio": "0.2"}

logger = logging.getLogger(__name__)


def topic_config(topic: Topic, replication: int = 1) -> dict[str, str]:
    """Kafka's configuration of one topic of the table."""
    config = {"cleanup.policy": topic.cleanup, "max.message.bytes": str(topic.max_message_bytes)}
    if "compact" in topic.cleanup:
        config |= _COMPACTED
    if topic.retention_hours:
        config["retention.ms"] = str(topic.retention_hours * _HOUR_MS)
    if replication > 2:
        # A record that was acknowledged is then on two nodes, and one node may be away.
        config["min.insync.replicas"] = "2"
    return config


async def ensure_topics(
    settings: KafkaSettings, topics: Sequence[Topic], *, timeout_seconds: float = 30.0
) -> dict[str, int]:
    """Make the topics that are missing and compare those that exist; may be called again and from many processes.

    On the embedded broker a topic is made by asking for it, always with four partitions.

    Args:
        settings: the brokers, the prefix of topic names, partitions and replicas; with `create_topics` false,
            missing topics are an error.
        topics: what should be there.
        timeout_seconds: for all of it.

    Returns:
        Full topic name -> partitions, in the order of `topics`.

    Raises:
        BrokerUnavailableError: no broker answers.
        TopicMismatchError: a topic exists with other partitions, or (TopicPolicyError) another cleanup policy.
        LogError: the broker refused; the text has its reason.
    """
    wanted = {settings.topic(topic.name): topic for topic in topics}
    try:
        async with asyncio.timeout(timeout_seconds), _admin(settings) as admin:
            return await patiently(lambda: _settle(admin, settings, wanted), math.inf)
    except TimeoutError as error:
        raise BrokerUnavailableError(
            f"the brokers at {settings.brokers} did not settle the topics within {timeout_seconds:g} s; "
            "look at the brokers' logs, then try again"
        ) from error
    except KafkaError as error:
        raise LogError(f"the brokers at {settings.brokers} refused a request about topics: {error!r}") from error


async def _settle(admin: AIOKafkaAdminClient, settings: KafkaSettings, wanted: Mapping[str, Topic]) -> dict[str, int]:
    """Make and compare once; what another try may mend is raised as Kafka's client tells it."""
    cluster = await admin.describe_cluster()
    if is_embedded(cluster):
        return _compared(settings, await _partitions(admin, list(wanted)), wanted)
    existing = set(await admin.list_topics())
    missing = {name: topic for name, topic in wanted.items() if name not in existing}
    if missing and not settings.create_topics:
        raise LogError(
            f"topics {', '.join(missing)} do not exist on {settings.brokers} and create_topics is off; "
            "create them (`kvatlas topics`), or set create_topics"
        )
    await _create(admin, settings, missing)
    counts = _compared(settings, await _partitions(admin, list(wanted)), wanted)
    await _compare_policies(admin, {name: wanted[name] for name in wanted if name not in missing})
    return counts


@asynccontextmanager
async def _admin(settings: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**client_config(settings, "kvatlas-topics"))
    try:
        try:
            await start_client(admin)
        except KafkaError as error:
            raise BrokerUnavailableError(
                f"no broker answers at {settings.brokers} ({error!r}); check the address and the security settings, "
                "or start one with `kvatlas broker start`"
            ) from error
        yield admin
    finally:
        await admin.close()


async def _create(admin: AIOKafkaAdminClient, settings: KafkaSettings, missing: Mapping[str, Topic]) -> None:
    if not missing:
        return
    reply = await admin.create_topics(
        [
            NewTopic(
                name,
                settings.partitions,
                settings.replication,
                topic_configs=topic_config(topic, settings.replication),
            )
            for name, topic in missing.items()
        ]
    )
    for name, code, message in reply.topic_errors:
        # Another process may make the same topics now; what it made is compared like any other.
        if code not in (0, TopicAlreadyExistsError.errno):
            raise LogError(f"topic {name!r} could not be created on {settings.brokers}: {message or for_code(code)}")
        logger.info("created topic %s with %d partitions", name, settings.partitions)


async def _partitions(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, int]:
    """Partition counts, once every partition has a leader."""
    while True:
        described = await admin.describe_topics(list(names))
        if all(
            topic["error_code"] == 0 and topic["partitions"] and all(p["leader"] >= 0 for p in topic["partitions"])
            for topic in described
        ):
            return {topic["topic"]: len(topic["partitions"]) for topic in described}
        for topic in described:
            error = for_code(topic["error_code"])
            # A topic of a moment ago may not be known yet, or may be without a leader: both pass.
            if topic["error_code"] and not getattr(error, "retriable", False):
                raise LogError(f"topic {topic['topic']!r}: {error.__name__}: {error.description}")
        await asyncio.sleep(_POLL_SECONDS)


def _compared(settings: KafkaSettings, counts: Mapping[str, int], wanted: Mapping[str, Topic]) -> dict[str, int]:
    wrong = [f"{name} has {counts[name]}" for name in wanted if counts[name] != settings.partitions]
    if wrong:
        raise TopicMismatchError(
            f"topics on {settings.brokers} have other partition counts than the {settings.partitions} of the settings: "
            f"{', '.join(wrong)}; give the count they have (--partitions), or another --topic-prefix. "
            "Records are placed by the count, so it cannot be changed in place"
        )
    return {name: counts[name] for name in wanted}


async def _compare_policies(admin: AIOKafkaAdminClient, topics: Mapping[str, Topic]) -> None:
    for name, config in (await _configs(admin, topics, ("cleanup.policy",))).items():
        found, asked = config.get("cleanup.policy"), topics[name].cleanup
        if found is not None and set(found.split(",")) != set(asked.split(",")):
            raise TopicPolicyError(
                f"topic {name} has cleanup.policy={found} and the table asks for {asked}: with another policy "
                "records that a restart needs are lost; set it with Kafka's own tools, or use another prefix"
            )


async def read_configs(
    settings: KafkaSettings, topics: Iterable[str], names: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return the configuration of topics, of those that this account may read it of and that a real Kafka keeps.

    Args:
        settings: the brokers.
        topics: full names of topics that exist.
        names: the entries wanted.

    Raises:
        BrokerUnavailableError: no broker answers.
        LogError: the broker refused.
    """
    try:
        async with _admin(settings) as admin:
            cluster = await admin.describe_cluster()
            if is_embedded(cluster):
                return {}
            return await _configs(admin, topics, names)
    except KafkaError as error:
        raise LogError(f"the brokers at {settings.brokers} refused a request about topics: {error!r}") from error


async def _configs(
    admin: AIOKafkaAdminClient, topics: Iterable[str], names: Sequence[str]
) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(names)) for topic in topics]
    found: dict[str, dict[str, str]] = {}
    for reply in await admin.describe_configs(resources) if resources else ():
        for code, message, _, topic, entries in (_resource(item) for item in reply.resources):
            if code:
                # Reading a configuration needs a right of its own, which services are not given: `kvatlas topics` is.
                logger.info("cannot read the configuration of topic %s: %s", topic, message)
                continue
            found[topic] = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
    return found


def _resource(item: Any) -> tuple[int, str, int, str, Sequence[Any]]:
    code, message, kind, name, entries = item
    return code, message, kind, name, entries
