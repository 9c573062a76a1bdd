"""A secured Kafka for the tests: an account for each service and tool, with the rights of the table and no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.rights import TOPIC_RIGHTS, Right, default_groups, rights_of
from kvatlas.deploy.brokers.security import Security

PARTITIONS = 2
PREFIX = "prod."
_OPERATIONS = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Create": AclOperation.CREATE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
}


def security() -> Security:
    """One account per row of the table, a super user, and a stranger without rights."""
    names = ("admin", "stranger", *TOPIC_RIGHTS)
    return Security(users={name: f"{name}-secret" for name in names}, super_users=("admin",))


class Accounts:
    """The accounts of a secured node: their settings files and their ACLs."""

    def __init__(self, node: KafkaNode, folder: Path) -> None:
        self._node, self._folder = node, folder
        self._admin = AdminClient(
            {
                "bootstrap.servers": node.bootstrap,
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": "admin",
                "sasl.password": "admin-secret",
                "ssl.ca.location": str(node.certificate),
            }
        )

    def rights(self, who: str) -> list[Right]:
        """What the table gives an account."""
        return rights_of(who, KafkaSettings(topic_prefix=PREFIX), groups=default_groups(who))

    def give(self, who: str, rights: Iterable[Right] | None = None) -> None:
        """Add ACLs: all of the table's, or these."""
        wanted = [acl for right in (self.rights(who) if rights is None else rights) for acl in _acls(who, right)]
        for future in self._admin.create_acls(wanted).values():
            future.result(60)

    def take(self, who: str, right: Right) -> None:
        """Remove ACLs."""
        filters = [
            AclBindingFilter(*_named(right), f"User:{who}", "*", _OPERATIONS[operation], AclPermissionType.ALLOW)
            for operation in right.operations
        ]
        for future in self._admin.delete_acls(filters).values():
            assert future.result(60), f"{who} did not have {right}"

    def config(self, who: str, **kafka: str) -> Path:
        """Write an account's settings file; keywords win over its [kafka] section."""
        secret = self._folder / f"{who}.password"
        secret.write_text(f"{who}-secret\n")
        section: Mapping[str, str] = {
            "brokers": self._node.bootstrap,
            "security_protocol": "SASL_SSL",
            "sasl_username": who,
            "sasl_password_file": str(secret),
            "ssl_cafile": str(self._node.certificate),
            "topic_prefix": PREFIX,
            **kafka,
        }
        lines = [f'{key} = "{value}"\n' for key, value in section.items() if value]
        create = "true" if who == "topics" else "false"
        path = self._folder / f"{who}.toml"
        path.write_text(f"[kafka]\n{''.join(lines)}partitions = {PARTITIONS}\ncreate_topics = {create}\n")
        return path


def _named(right: Right) -> tuple[ResourceType, str, ResourcePatternType]:
    kind = ResourceType.GROUP if right.kind == "group" else ResourceType.TOPIC
    return kind, right.name, ResourcePatternType.LITERAL


def _acls(who: str, right: Right) -> list[AclBinding]:
    return [
        AclBinding(*_named(right), f"User:{who}", "*", _OPERATIONS[operation], AclPermissionType.ALLOW)
        for operation in right.operations
    ]
