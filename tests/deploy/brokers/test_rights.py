"""The table of rights: documented, printable, and checked against what Kafka tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import OPERATIONS, TOPIC_RIGHTS, Right, lacking, rights_of
from kvatlas.deploy.cli.entry import main

PAGE = Path(__file__).parents[3] / "docs" / "security.md"


def test_the_page_has_the_table_that_the_services_check():
    """Every row of docs/security.md is what a service asks for, and none is missing."""
    rows = re.findall(r"^\| (\w+) \| `([\w-]+)` \| ([\w, ]+) \|$", PAGE.read_text(), flags=re.M)
    written = {(part, topic, tuple(operations.split(", "))) for part, topic, operations in rows}
    meant = {
        (part, right.name, right.operations)
        for part in TOPIC_RIGHTS
        if part != "topics"
        for right in rights_of(part, KafkaSettings())
    }
    assert written == meant


def test_prefix_app_and_index_version_are_in_the_names():
    """A deployment with a prefix, another app and a second index version asks for its own topics."""
    names = {right.name for right in rights_of("worker", KafkaSettings(topic_prefix="p."), app="a", version="two")}
    assert {"p.kv-events", "p.kv-blocks.two", "p.a.two-block_index-changelog"} <= names
    assert "p.kv-blocks" not in names


@pytest.mark.parametrize(
    ("bits", "missing"),
    [
        (1 << OPERATIONS["Read"] | 1 << OPERATIONS["Write"], []),
        (1 << OPERATIONS["Read"], ["Write"]),
        (0, ["Read", "Write"]),
        (-(1 << 31), []),
    ],
)
def test_bits_that_kafka_tells_become_operations(bits, missing):
    """A bit that is not set is a missing operation; a broker that tells nothing is believed."""
    right = Right("topic", "t", ("Read", "Write"))
    assert [operation for found in lacking(right, bits) for operation in found.operations] == missing


def test_acl_commands_name_accounts_topics_and_groups(capsys):
    """`kvatlas topics --acls` prints one call of Kafka's tool for each right, under the given accounts."""
    words = ["topics", "--acls", "--topic-prefix", "x.", "--brokers", "h:1", "--account", "bridge=kv-bridge"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    start = "kafka-acls.sh --bootstrap-server h:1 --command-config admin.properties --add --allow-principal"
    assert f"{start} User:kv-bridge --operation Read --operation Write --topic x.kv-events" in lines
    assert f"{start} User:worker --operation Read --group x.kvatlas" in lines
    assert all(line.startswith(start) for line in lines)


def test_an_account_for_an_unknown_part_is_refused(capsys):
    """A misspelt part in --account is an error, not an ACL that is left out."""
    assert main(["topics", "--acls", "--account", "brigde=x"]) == 2
    assert "brigde=x" in capsys.readouterr().err
