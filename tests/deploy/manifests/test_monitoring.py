"""Rules and dashboard: every query parses and asks only for metrics and labels that the services export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import promql_parser as promql
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import Metric

from kvatlas.bridge.ingest.loads import EngineLoads
from kvatlas.bridge.ingest.streams import EngineStreams
from kvatlas.bridge.kafka.producer import RecordProducer
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.metrics import BridgeCollector
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.connector.metrics import Metrics, PrometheusCollector
from kvatlas.scorer.api import metrics as scorer_metrics
from kvatlas.scorer.gateway import metrics as picker_metrics
from kvatlas.streams import metrics as worker_metrics
from kvatlas.streams.options import WorkerSettings

ROOT: Final = Path(__file__).parents[3]
RULES: Final = ROOT / "deploy/monitoring/rules.yaml"
DASHBOARD: Final = ROOT / "deploy/monitoring/dashboard.json"
PROMETHEUS: Final = ROOT / "deploy/container/prometheus.yml"

#: Prometheus's own, and what it adds to every series.
OWN: Final = {"up": frozenset[str]()}
TARGET_LABELS: Final = frozenset({"job", "instance"})
JOBS: Final = {"kvatlas-bridge", "kvatlas-worker", "kvatlas-scorer", "kvatlas-picker"}
#: Label -> folders where its values are spelt out.
SPELT: Final = {"kind": "streams", "agent": "streams", "code": "", "operation": "scorer", "job": ""}
GRPC_CODES: Final = {"OK", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN"}


def named(kind: str, name: str, labels: tuple[str, ...]) -> dict[str, frozenset[str]]:
    plain = frozenset(labels)
    if kind == "counter":
        return {f"{name.removesuffix('_total')}_total": plain}
    if kind == "histogram":
        return {f"{name}_bucket": plain | {"le"}, f"{name}_sum": plain, f"{name}_count": plain}
    return {name: plain}


def of_module(module: Any) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for item in vars(module).values():
        if isinstance(item, Counter | Gauge | Histogram):
            found |= named(item._type, item._name, tuple(item._labelnames))
    return found


def of_families(families: Iterator[Metric]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for family in families:
        found |= named(family.type, family.name, tuple(getattr(family, "_labelnames", ())))
    return found


def exported() -> dict[str, frozenset[str]]:
    """Name of every series the services export, with its labels."""
    producer = RecordProducer(KafkaSettings())
    streams = EngineStreams(BridgeSettings(), producer, lambda: 0, Background())
    bridge = of_families(iter(BridgeCollector(streams, EngineLoads(streams), producer).collect()))
    connector = of_families(PrometheusCollector(Metrics()).collect())
    streams.wires.close()
    ours = of_module(worker_metrics) | of_module(scorer_metrics) | of_module(picker_metrics)
    return {**OWN, **bridge, **connector, **ours}


EXPORTED: Final = exported()


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return [{**rule, "group": group["name"]} for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"])


def queries() -> dict[str, str]:
    found = {f"rule {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel.get("targets", []):
            # Grafana puts a duration there.
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return found


def selectors(node: Any) -> Iterator[promql.VectorSelector]:
    """Every selector of a parsed query."""
    if isinstance(node, promql.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        child = getattr(node, name, None)
        if child is not None and not isinstance(child, str):
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def groupings(node: Any) -> Iterator[tuple[list[str], Any]]:
    """Every `by (...)` with the aggregation that it belongs to."""
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        yield list(node.modifier.labels), node
    for name in ("expr", "lhs", "rhs"):
        child = getattr(node, name, None)
        if child is not None:
            yield from groupings(child)
    for child in getattr(node, "args", None) or ():
        yield from groupings(child)


QUERIES: Final = queries()


@pytest.mark.parametrize("where", QUERIES)
def test_query(where: str) -> None:
    """The query parses, and its metrics, matchers and groupings are ones that the services export."""
    tree = promql.parse(QUERIES[where])
    found = list(selectors(tree))
    assert {s.name for s in found} == set(re.findall(r"\b(?:kvatlas_\w+|up)\b(?=[\s{\[)]|$)", QUERIES[where]))
    for selector in found:
        assert selector.name in EXPORTED, f"no service exports {selector.name}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in EXPORTED[selector.name] | TARGET_LABELS, (
                f"{selector.name} has no label {matcher.name}"
            )
            for value in re.split(r"[|()]", matcher.value):
                check_value(matcher.name, value)
    for labels, aggregation in groupings(tree):
        for selector in selectors(aggregation):
            assert set(labels) <= EXPORTED[selector.name] | TARGET_LABELS, f"{selector.name} lacks one of {labels}"


def check_value(label: str, value: str) -> None:
    """Check that a label's value is one that the code gives it."""
    if label == "job":
        assert value in {"kvatlas-", ".*", "kvatlas-.*", "", "bridge", "worker", "scorer"} | JOBS
    elif label == "code":
        assert value in GRPC_CODES
    elif folder := SPELT.get(label):
        texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))
        assert f'"{value}"' in texts, f"nothing in {folder} says {label}={value}"


def test_the_check_can_fail() -> None:
    """A metric that nobody exports would be seen, also deep inside a query."""
    tree = promql.parse("histogram_quantile(0.99, sum by (le) (rate(kvatlas_absent_bucket[5m]))) > 1")
    assert [s.name for s in selectors(tree)] == ["kvatlas_absent_bucket"]
    assert "kvatlas_absent_bucket" not in EXPORTED
    assert [labels for labels, _ in groupings(tree)] == [["le"]]


def test_every_kind_of_service_is_covered() -> None:
    """Rules ask for lag, gaps, ghosts and stale pods; the dashboard shows every service."""
    asked = " ".join(rule["expr"] for rule in rules())
    for name in ("lag_ms", "lost_total", "gaps_total", "removals_unknown", "sweep_entries", "silence_seconds"):
        assert name in asked
    shown = " ".join(QUERIES[where] for where in QUERIES if where.startswith("panel"))
    for service in ("bridge", "worker", "scorer", "connector"):
        assert f"kvatlas_{service}_" in shown


def test_rules_say_what_to_do() -> None:
    """Every alert has its own name, a severity, a summary and a description, with labels that its query leaves."""
    alerts = rules()
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            tree = promql.parse(rule["expr"])
            outer = next(iter(groupings(tree)), None)
            left = set(outer[0]) if outer else set().union(*(EXPORTED[s.name] for s in selectors(tree))) | TARGET_LABELS
            assert label in left, f"{rule['alert']} has no label {label}"


def test_thresholds_follow_the_defaults() -> None:
    """Alerts on silence and on the backlog stand at what the settings say by default."""
    by_name = {rule["alert"]: rule["expr"] for rule in rules()}
    assert f"> {BridgeSettings().stale_seconds:g}" in by_name["KvatlasPodStale"]
    assert BridgeSettings().buffer_bytes == 2 * 128 * 1024 * 1024
    assert "> 128 * 1024 * 1024" in by_name["KvatlasBridgeBacklog"]
    assert WorkerSettings().sweep_interval_seconds < 30 * 60, "KvatlasSweepStalled looks at half an hour"


def test_dashboard_shape() -> None:
    """Panels have ids and places of their own, a unit, a text, and a data source that can be chosen."""
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert document["uid"] == "kvatlas"
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_legends_use_labels_that_are_there() -> None:
    """A legend names only labels that its query leaves."""
    for panel in panels():
        for target in panel.get("targets", []):
            tree = promql.parse(target["expr"].replace("$__rate_interval", "1m"))
            left = set().union(*(set(labels) for labels, _ in groupings(tree))) - {"le"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left


def test_scraped_jobs() -> None:
    """Prometheus of the compose file gives the jobs the names that rules and dashboard use."""
    document = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    assert {job["job_name"] for job in document["scrape_configs"]} == JOBS


def test_every_alert_is_explained() -> None:
    """The table in the documentation has exactly the alerts of the rules."""
    text = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| Kvatlas")]
    assert {name.strip() for row in rows for name in row.split(",")} == {rule["alert"] for rule in rules()}


def test_what_the_pickers_page_names_is_shown() -> None:
    """Each metric in the picker's page and the table of faults is on the dashboard or in a rule."""
    text = (ROOT / "docs/picker.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bkvatlas_picker_[a-z_]+", text))
    shown = DASHBOARD.read_text(encoding="utf-8") + "".join(rule["expr"] for rule in rules())
    assert named >= {"kvatlas_picker_degraded_total", "kvatlas_picker_served_total", "kvatlas_picker_regret_tokens"}
    assert {name for name in named if name not in shown} == set()
