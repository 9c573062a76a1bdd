"""``kvatlas topics``."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from collections.abc import Mapping, Sequence

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.topics import TOPICS, Topic, changelog_topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import TOPIC_RIGHTS, contact, default_groups, rights_of
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka")
    parser.add_argument("--app", default="kvatlas", help="the workers' app name, which their changelogs carry")
    parser.add_argument("--check", action="store_true", help="create nothing; fail when a topic is missing")
    parser.add_argument(
        "--acls",
        action="store_true",
        help="do nothing but print the commands of Kafka's own tool that give services and tools their rights",
    )
    parser.add_argument(
        "--account",
        action="append",
        default=[],
        metavar="PART=USER",
        help="with --acls: the user that a service or tool logs in as (default: the part's own name), repeatable",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Create what is missing and compare what exists: partitions and cleanup policy; or print ACLs."""
    settings: KafkaSettings = common.load_sections(args)["kafka"]
    if args.acls:
        for line in acl_commands(settings, args.app, _accounts(args.account)):
            print(line)
        return 0
    if args.check:
        settings = msgspec.structs.replace(settings, create_topics=False)
    topics = (*TOPICS, *changelog_topics(args.app))
    counts = asyncio.run(_ensured(settings, topics))
    if args.json:
        print(json.dumps(counts))
        return 0
    by_name = {settings.topic(topic.name): topic for topic in topics}
    for name, partitions in counts.items():
        topic = by_name[name]
        kept = f"{topic.retention_hours} h" if topic.retention_hours else "compacted"
        print(f"{name:<40} {partitions:>5} partitions  by {topic.by:<6} {kept}")
    return 0


async def _ensured(settings: KafkaSettings, topics: Sequence[Topic]) -> dict[str, int]:
    (await contact(settings)).close()  # its errors say which setting is refused
    return await ensure_topics(settings, topics)


def _accounts(pairs: Sequence[str]) -> dict[str, str]:
    accounts = {}
    for pair in pairs:
        part, separator, user = pair.partition("=")
        if not separator or not user or part not in TOPIC_RIGHTS:
            raise SettingsError(f"--account {pair!r} is not PART=USER with PART one of {', '.join(TOPIC_RIGHTS)}")
        accounts[part] = user
    return accounts


def acl_commands(settings: KafkaSettings, app: str, accounts: Mapping[str, str]) -> list[str]:
    """Return one call of kafka-acls.sh for each right of each part."""
    commands = []
    for part in TOPIC_RIGHTS:
        user = shlex.quote(f"User:{accounts.get(part, part)}")
        for right in rights_of(part, settings, app=app, groups=default_groups(part, app)):
            operations = " ".join(f"--operation {operation}" for operation in right.operations)
            commands.append(
                f"kafka-acls.sh --bootstrap-server {settings.brokers} --command-config admin.properties --add "
                f"--allow-principal {user} {operations} --{right.kind} {shlex.quote(right.name)}"
            )
    return commands
