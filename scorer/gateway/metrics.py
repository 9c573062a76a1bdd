"""Metrics of the picker; each name is defined here and nowhere else."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2.5)
_FIRST_TOKEN: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
_TOKENS: Final = (0, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144)

DECISIONS: Final = Counter(
    "kvatlas_picker_decisions", "Requests decided: routed, refused, passed on without a pod.", ["outcome", "rule"]
)
REFUSED: Final = Counter("kvatlas_picker_refused", "Requests refused, by reason.", ["reason"])
DEGRADED: Final = Counter(
    "kvatlas_picker_degraded", "Requests that load alone decided, by what was missing.", ["cause"]
)
SECONDS: Final = Histogram("kvatlas_picker_decision_seconds", "Time of a decision.", buckets=_SECONDS)
OPEN_STREAMS: Final = Gauge("kvatlas_picker_open_streams", "ext_proc streams that are open.")
ENDPOINTS: Final = Gauge("kvatlas_picker_endpoints", "Endpoints known.", ["state"])
STALE: Final = Gauge("kvatlas_picker_stale_endpoints", "Endpoints whose engine's metrics are too old or absent.")
SCRAPES: Final = Counter("kvatlas_picker_scrapes", "Reads of engines' metrics.", ["result"])
DISCOVERY_ERRORS: Final = Counter("kvatlas_picker_discovery_errors", "Sources of endpoints that gave none.", ["source"])
IN_FLIGHT: Final = Gauge("kvatlas_picker_in_flight_requests", "Requests given out whose end was not seen.")
QUEUED: Final = Gauge("kvatlas_picker_queued_tokens", "Prompt tokens given out and not computed yet, all endpoints.")
PREDICTIONS: Final = Counter(
    "kvatlas_picker_predictions",
    "Predicted cached tokens beside the engine's: exact, over, under, or unknown, by cause.",
    ["verdict", "cause"],
)
PREDICTED_TOKENS: Final = Counter("kvatlas_picker_predicted_tokens", "Cached tokens predicted, of judged requests.")
CACHED_TOKENS: Final = Counter("kvatlas_picker_cached_tokens", "Cached tokens by the engine's word.")
PROMPT_TOKENS: Final = Counter("kvatlas_picker_prompt_tokens", "Prompt tokens by the engine's word.")
FIRST_TOKEN: Final = Histogram(
    "kvatlas_picker_first_token_seconds",
    "Time from decision to first token, by the share of the prompt that was cached.",
    ["cached"],
    buckets=_FIRST_TOKEN,
)
REGRET: Final = Histogram(
    "kvatlas_picker_regret_tokens", "Tokens that the best other pod would have cost less.", buckets=_TOKENS
)
SERVED: Final = Counter("kvatlas_picker_served", "Responses by whether the picked pod answered.", ["by"])
FOREIGN: Final = Counter("kvatlas_picker_foreign_decisions", "Decisions of other pickers taken into account.")
SHARING: Final = Histogram(
    "kvatlas_picker_sharing_seconds",
    "From another picker's decision, by its clock, until it counts here.",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
)


def cached_share(cached: int, prompt: int) -> str:
    """Return the label of a share: quarters."""
    if prompt <= 0 or cached <= 0:
        return "0"
    share = cached / prompt
    for bound in (25, 50, 75):
        if share * 100 < bound:
            return f"<{bound}%"
    return ">=75%"
