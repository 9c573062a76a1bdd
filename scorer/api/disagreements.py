"""Disagreements told: in a metric, and once in the log (:mod:`kvatlas.scorer.scoring.agreement`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvatlas.bridge.model.loads import ASKED, FOUND
from kvatlas.bridge.model.records import DecisionRecord, PodRecord
from kvatlas.scorer.api import metrics
from kvatlas.scorer.scoring.agreement import Agreement
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.scoring.decisions import DECISION, SERVED

log = logging.getLogger(__name__)


class Disagreements:
    """What a scorer answered and what engines said, compared."""

    def __init__(self) -> None:
        self._agreement = Agreement()
        self._told: set[tuple[str, str]] = set()

    def answered(self, model: str, scored: Scored) -> None:
        """Count a score, and take note of it; blocks that only a decision vouches for are no match."""
        metrics.answered(model, scored)
        if not scored.partial:
            held = (entry.matched_blocks - entry.speculative_blocks for entry in scored.scores.values())
            self._agreement.scored(model, scored.blocks, max(held, default=0))

    def decided(self, record: DecisionRecord) -> None:
        """Take note of a request that was scored before it was sent, and of what its engine said of it."""
        if record.degraded:
            return
        if record.kind == SERVED:
            self._agreement.served(record.pod, record.prompt_tokens, record.predicted_tokens, record.cached_tokens)
        elif record.kind == DECISION:
            self._agreement.sent(record.pod, record.prompt_tokens, record.predicted_tokens)

    def look(self, pods: Iterable[PodRecord]) -> None:
        """Tell what is found now, with what the pods' engines count of their own prefix caches."""
        known = list(pods)
        for pod in known:
            if ASKED in pod.load and FOUND in pod.load:
                self._agreement.measured(pod.pod, pod.load[ASKED], pod.load[FOUND])
        found = self._agreement.findings(known)
        metrics.DISAGREEMENTS.clear()
        for finding in found:
            metrics.DISAGREEMENTS.labels(finding.subject, finding.kind).set(finding.requests)
            if (finding.subject, finding.kind) not in self._told:
                log.warning(
                    "%s: %s over %d requests; %s", finding.subject, finding.kind, finding.requests, finding.cause
                )
        self._told = {(finding.subject, finding.kind) for finding in found}
