"""Records of a picker's decisions and of what came of them, for ``kv-decisions``."""

from __future__ import annotations

import time
from typing import Any, Final

from kvatlas.bridge.model.block_key import tenant_of
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.scorer.gateway.decider import Made
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.outcome import Joined
from kvatlas.scorer.scoring.decisions import DECISION, SERVED
from kvatlas.scorer.service import ScorerService

#: So long a decision vouches for blocks that no event has shown.
_SPECULATIVE_SECONDS: Final = 5.0


class Recorder:
    """Makes the records and hands them on: to the scorer here, and through Kafka to all others.

    Args:
        settings: of the picker.
        scorer: the scorer in this process; None records nothing.
    """

    def __init__(self, settings: PickerSettings, scorer: ScorerService | None) -> None:
        self._settings = settings
        self._scorer = scorer

    def decided(self, made: Made) -> int:
        """Record a decision: its blocks count as held by the pod from now on, in all scorers; returns its epoch."""
        if self._scorer is None:
            return 0
        now_ns = time.time_ns()
        pod = self._scorer.pods.merged.get(made.endpoint.pod)
        prompt = made.prompt
        record = DecisionRecord(
            kind=DECISION,
            request_id=made.request_id,
            pod=made.endpoint.pod,
            pod_epoch=pod.epoch if pod is not None else 0,
            model=made.model,
            scorer=self._settings.name,
            decided_ns=now_ns,
            expires_ns=now_ns + int(_SPECULATIVE_SECONDS * 1e9),
            policy=made.policy,
            endpoint=made.endpoint.address,
            prompt_tokens=made.prediction.prompt_tokens,
            predicted_tokens=made.prediction.cached_tokens,
            compute_tokens=made.compute_tokens,
            session=made.session,
            degraded=made.prediction.degraded,
            **_scored(made),
        )
        if prompt is not None and pod is not None:
            self._scorer.core.decisions.put(record, now_ns)
        self._scorer.publish(record)
        return record.pod_epoch

    def served(self, joined: Joined) -> None:
        """Record what came of a decision."""
        if self._scorer is None:
            return
        prediction = joined.decision.prediction
        usage = joined.usage
        self._scorer.publish(
            DecisionRecord(
                kind=SERVED,
                request_id=joined.request_id,
                pod=prediction.pod,
                scorer=self._settings.name,
                decided_ns=time.time_ns(),
                outcome=joined.verdict.kind,
                endpoint=joined.served or prediction.address,
                prompt_tokens=usage.prompt_tokens,
                predicted_tokens=prediction.cached_tokens,
                degraded=prediction.degraded,
                cached_tokens=usage.cached_tokens,
                first_token_ms=joined.first_token_ms,
                status=joined.status,
                cause=joined.verdict.cause,
                regret_tokens=joined.verdict.regret_tokens,
            )
        )


def _scored(made: Made) -> dict[str, Any]:
    prompt = made.prompt
    if prompt is None:
        return {}
    remembered, pod = prompt.remembered, made.endpoint.pod
    return {
        "keys": remembered.keys,
        "block_size_tokens": remembered.block_size_tokens,
        "predicted_blocks": remembered.scores.get(pod, (0.0, 0))[1],
        "speculative_blocks": remembered.speculative.get(pod, 0),
        "scores": remembered.scores,
        "freshness": remembered.partitions,
        "tenant": tenant_of(remembered.cache_salt),
    }
