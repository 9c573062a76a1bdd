"""Agreement of predictions with engines: models that never match, pods whose engine says otherwise. Pure.

A fleet that is set up wrongly works, only without hits. Two things tell it from a fleet without shared prefixes:

- prompts of a model are scored and its pods announce blocks, but no block of any prompt is ever found;
- what an engine says it had cached differs from what was predicted, request after request; where its answers do not
  tell, what it counts of its own prefix cache is compared over the requests that were sent to it meanwhile.

Both are judged over a window of requests, so that a start or a burst of new prompts is no finding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeVar

from kvatlas.bridge.model.records import GONE, PodRecord

T = TypeVar("T")
Kind = Literal["no-match", "engine-finds-more", "engine-finds-less"]

#: Requests that a judgement looks at, and how many it needs.
WINDOW_REQUESTS: Final = 200
LEAST_REQUESTS: Final = 50
#: Shares of the prompts' tokens: next to nothing, and surely something.
NOTHING: Final = 0.02
SOMETHING: Final = 0.2
#: An engine's counts speak of other requests than ours where they differ by more than this share.
OTHERS: Final = 0.25
#: Models and pods watched at most; further ones wait until one of these is gone.
_MOST: Final = 1_000

CAUSES: Final[dict[Kind, str]] = {
    "no-match": "the scorer's tokens, model name, salt or block size are not the engines': run kvatlas doctor",
    "engine-finds-more": "events of this pod are missing or stand under another name: run kvatlas doctor",
    "engine-finds-less": "the engine reuses no prefixes, or requests reach another pod: run kvatlas doctor",
}


class Disagreement(NamedTuple):
    """One finding.

    Attributes:
        subject: model of ``no-match``, pod otherwise.
        kind: what is wrong.
        requests: how many it rests on.
        predicted, real: shares of the prompts' tokens, 0 to 1; ``real`` is -1 where no engine told.
    """

    subject: str
    kind: Kind
    requests: int
    predicted: float
    real: float

    @property
    def cause(self) -> str:
        """The likely cause, and what to do."""
        return CAUSES[self.kind]


class _Sent:
    """What was sent to a pod since its engine's counts were last taken, and those counts."""

    __slots__ = ("asked", "found", "predicted", "prompts", "requests")

    def __init__(self) -> None:
        self.requests = self.prompts = self.predicted = 0
        self.asked = self.found = -1.0

    def begin(self, asked: float, found: float) -> None:
        self.requests = self.prompts = self.predicted = 0
        self.asked, self.found = asked, found


class Agreement:
    """Windows of the newest requests, by model and by pod."""

    def __init__(self) -> None:
        self._scored: dict[str, deque[bool]] = {}
        self._served: dict[str, deque[tuple[int, int, int]]] = {}
        self._sent: dict[str, _Sent] = {}
        self._measured: dict[str, Disagreement] = {}

    def scored(self, model: str, blocks: int, longest: int) -> None:
        """Take note of a scored prompt: its full blocks, and the longest match of any pod."""
        if blocks > 0:
            window = _window(self._scored, model)
            if window is not None:
                window.append(longest > 0)

    def served(self, pod: str, prompt_tokens: int, predicted_tokens: int, cached_tokens: int) -> None:
        """Take note of what an engine said of a request; -1 for what it did not say."""
        if prompt_tokens > 0 and cached_tokens >= 0:
            window = _window(self._served, pod)
            if window is not None:
                window.append((prompt_tokens, max(predicted_tokens, 0), cached_tokens))

    def sent(self, pod: str, prompt_tokens: int, predicted_tokens: int) -> None:
        """Take note of a request that goes to a pod."""
        since = self._since(pod)
        if since is not None and prompt_tokens > 0:
            since.requests += 1
            since.prompts += prompt_tokens
            since.predicted += max(predicted_tokens, 0)

    def measured(self, pod: str, asked_tokens: float, found_tokens: float) -> None:
        """Take note of what an engine counts since its start: prompt tokens looked up in its cache, and found."""
        since = self._since(pod)
        if since is None:
            return
        asked, found = asked_tokens - since.asked, found_tokens - since.found
        if since.asked < 0 or asked < 0 or found < 0:  # the first counts, or those of an engine that was started anew
            since.begin(asked_tokens, found_tokens)
            return
        ours = abs(asked - since.prompts) <= OTHERS * since.prompts
        # What was sent just now may not be counted yet.
        if since.requests >= (LEAST_REQUESTS if ours else WINDOW_REQUESTS):
            self._measured.pop(pod, None)
            if ours:
                finding = _finding(pod, since.requests, since.predicted / since.prompts, found / asked)
                if finding is not None:
                    self._measured[pod] = finding
            since.begin(asked_tokens, found_tokens)

    def _since(self, pod: str) -> _Sent | None:
        since = self._sent.get(pod)
        if since is None and len(self._sent) < _MOST:
            since = self._sent[pod] = _Sent()
        return since

    def findings(self, pods: Iterable[PodRecord]) -> list[Disagreement]:
        """Return what is wrong now; forgets models and pods that are gone.

        Args:
            pods: all that are known; a model without a pod that has announced something cannot match.
        """
        live = [pod for pod in pods if pod.state != GONE]
        announcing = {pod.model for pod in live if pod.last_sequence >= 0 and pod.block_size_tokens}
        names = {pod.pod for pod in live}
        models = {pod.model for pod in live}
        for gone in set(self._scored) - models:
            del self._scored[gone]
        for each in (self._served, self._sent, self._measured):
            for gone in set(each) - names:
                del each[gone]
        found = [
            Disagreement(model, "no-match", len(window), 0.0, -1.0)
            for model, window in self._scored.items()
            if model in announcing and len(window) >= LEAST_REQUESTS and not any(window)
        ]
        for pod, served in self._served.items():
            if len(served) >= LEAST_REQUESTS and (judged := _judge(pod, served)) is not None:
                found.append(judged)
        found += [finding for pod, finding in self._measured.items() if pod not in self._served]
        return sorted(found)


def _window(windows: dict[str, deque[T]], name: str) -> deque[T] | None:
    window = windows.get(name)
    if window is None and len(windows) < _MOST:
        window = windows[name] = deque(maxlen=WINDOW_REQUESTS)
    return window


def _judge(pod: str, served: Iterable[tuple[int, int, int]]) -> Disagreement | None:
    rows = list(served)
    prompts, predicted, real = (sum(column) for column in zip(*rows, strict=True))
    return _finding(pod, len(rows), predicted / prompts, real / prompts)


def _finding(pod: str, requests: int, predicted: float, real: float) -> Disagreement | None:
    if predicted < NOTHING and real > SOMETHING:
        return Disagreement(pod, "engine-finds-more", requests, predicted, real)
    if predicted > SOMETHING and real < NOTHING:
        return Disagreement(pod, "engine-finds-less", requests, predicted, real)
    return None
