"""``kvatlas topics``."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Final

import msgspec

from kvatlas.bridge.records import TOPICS, changelog_topics
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.commands import common

HELP: Final = "create the topics, or check those that exist"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka")
    parser.add_argument("--app", default="kvatlas", help="the workers' app name, which their changelogs carry")
    parser.add_argument("--check", action="store_true", help="create nothing; fail when a topic is missing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Create what is missing and compare what exists: partitions and cleanup policy."""
    settings: KafkaSettings = common.load_sections(args)["kafka"]
    if args.check:
        settings = msgspec.structs.replace(settings, create_topics=False)
    topics = (*TOPICS, *changelog_topics(args.app))
    counts = asyncio.run(ensure_topics(settings, topics))
    if args.json:
        print(json.dumps(counts))
        return 0
    by_name = {settings.topic(topic.name): topic for topic in topics}
    for name, partitions in counts.items():
        topic = by_name[name]
        kept = f"{topic.retention_hours} h" if topic.retention_hours else "compacted"
        print(f"{name:<40} {partitions:>5} partitions  by {topic.by:<6} {kept}")
    return 0
