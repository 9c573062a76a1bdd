"""Scorers' metrics pages become rows."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.history.top_scorers import Scorers, read_page, row_of


class Page:
    """A scorer's page of metrics, under the names that the scorer exports."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("kvatlas_scorer_requests", "n", ["operation", "code"], registry=registry)
        bounds = (0.001, 0.002, 0.004)
        self.seconds = Histogram(
            "kvatlas_scorer_request_seconds", "s", ["operation"], buckets=bounds, registry=registry
        )
        self.outcomes = Counter("kvatlas_scorer_outcomes", "n", ["model", "outcome"], registry=registry)
        self.predicted = Counter("kvatlas_scorer_predicted_blocks", "n", ["model"], registry=registry)
        self.real = Counter("kvatlas_scorer_real_blocks", "n", ["model"], registry=registry)
        self.pods = Gauge("kvatlas_scorer_pods", "n", registry=registry)

    def ask(self, operation: str, seconds: float, times: int = 1, code: str = "OK") -> None:
        """Count requests."""
        self.requests.labels(operation, code).inc(times)
        for _ in range(times):
            self.seconds.labels(operation).observe(seconds)

    def text(self) -> str:
        """Return the page."""
        return generate_latest(self._registry).decode()


def test_rates_and_latency_are_of_the_time_between_two_looks():
    """What happened before the first look does not count at the second; other operations never do."""
    page = Page()
    page.ask("Score", 0.0035, times=100)
    page.ask("ListPods", 0.0001, times=1000)
    before = read_page(page.text(), 10.0)
    page.ask("Score", 0.0005, times=10)
    page.ask("Pick", 0.0015, times=10)
    row = row_of("s", read_page(page.text(), 14.0), before)
    assert row.requests_per_second == 5.0
    assert row.p50_ms == pytest.approx(1.0)
    assert row.p99_ms == pytest.approx(1.98)


def test_without_requests_between_looks_the_latency_is_that_since_the_start():
    """A quiet scorer shows its figures of before, at a rate of nothing; one that never worked shows none."""
    page = Page()
    assert row_of("s", read_page(page.text(), 1.0), None).p50_ms is None
    page.ask("Score", 0.0015, times=4)
    sample = read_page(page.text(), 2.0)
    row = row_of("s", sample, read_page(page.text(), 1.0))
    assert (row.requests_per_second, row.p50_ms) == (0.0, 1.5)


def test_a_restarted_scorer_has_no_negative_rate():
    """Counters that fell began anew."""
    old, new = Page(), Page()
    old.ask("Score", 0.001, times=50)
    new.ask("Score", 0.001, times=2)
    assert row_of("s", read_page(new.text(), 2.0), read_page(old.text(), 1.0)).requests_per_second == 0.0


def test_errors_and_outcomes_become_shares():
    """Outcomes without a verdict say nothing; blocks found are compared with blocks predicted."""
    page = Page()
    page.ask("Score", 0.001, times=3)
    page.ask("Score", 0.001, code="UNAVAILABLE")
    for outcome, times in (("hit", 3), ("wrong", 1), ("unknown", 5), ("cold", 7), ("unproven", 9)):
        page.outcomes.labels("m", outcome).inc(times)
    page.predicted.labels("m").inc(10)
    page.real.labels("m").inc(8)
    page.pods.set(7)
    row = row_of("s", read_page(page.text(), 1.0), None)
    assert (row.errors, row.hit_ratio, row.realised, row.pods) == (0.25, 0.75, 0.8, 7)


async def test_a_scorer_that_does_not_answer_is_down():
    """Nobody listens there, and a name that does not exist: both are rows, not errors."""
    rows = await Scorers(["127.0.0.1:1", "no-such-host.invalid:9464"]).look()
    assert [(row.scorer, row.up) for row in rows] == [("127.0.0.1:1", False), ("no-such-host.invalid:9464", False)]


@pytest.mark.parametrize("address", ["scorer", "scorer:http", ":"])
def test_an_address_without_a_port_is_refused(address):
    """The error names the flag."""
    with pytest.raises(SettingsError, match="--scorer-metrics"):
        Scorers([address])
