"""Load of endpoints: what their engines report, and what was given out since and is not in a report yet. Pure.

Three things are known of an endpoint, each with its own age:

- its engine's last report (running, waiting, share of the KV cache in use), read off every so often;
- the requests given to it, by this picker and, through ``kv-decisions``, by all others;
- what became of those: the first token of a response, or its end, where somebody sees it.

Reports say how many requests wait, not how long their prompts are, so the prompt tokens in front of an engine are
counted here: given out, less what was computed since. Engines compute prompts in the order of arrival: a first token
says that every prompt given before it is done too. Where nobody sees first tokens the queue is taken to shrink at a
rate: the one learned while somebody did, else the one of the settings.

A report that is older than the limit, or than it says itself, is *stale*: it is not used, and an endpoint whose load is
stale says so. That is not the same as no load.

An engine that has reported and does no more, because nobody listens at its address, or it sleeps, or for a longer time
nothing at all came, is *silent*: it may be gone, and whoever else there is comes before it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final, NamedTuple

#: A learned rate moves this share of the way to each new measurement.
_LEARN: Final = 0.1
#: A report that shows an idle engine clears what was given out so long before it; later requests may not be in it.
_SETTLE_SECONDS: Final = 0.1
#: An engine that was heard before and then not for so long is silent, whatever the reason.
_SILENT_SECONDS: Final = 10.0
#: An endpoint is full when so many requests wait, or so much of its KV cache is in use: as llm-d has it.
_FULL_WAITING: Final = 5.0
_FULL_USAGE: Final = 0.8
#: First tokens seen within this time mean that somebody watches the endpoint's responses.
_WATCHED_SECONDS: Final = 30.0


class EngineReport(NamedTuple):
    """What an engine said of itself.

    Attributes:
        running, waiting: requests in its batch, and before it.
        usage: share of its KV cache in use, 0 to 1.
        at: when it was read, monotonic seconds.
        lasts: seconds for which it is good, where that is longer than the limit; it is told on change.
        asleep: whether the engine has put its weights or its cache away.
    """

    running: float
    waiting: float
    usage: float
    at: float
    lasts: float = 0.0
    asleep: bool = False


class Load(NamedTuple):
    """An endpoint's load at a moment.

    Attributes:
        prefill_tokens: prompt tokens given out and not computed yet.
        requests: requests running or waiting.
        waiting: requests that wait, as reported, with what was given out since.
        usage: share of the KV cache in use, -1 where unknown.
        stale: the engine's report is too old to be used, or there was none.
        silent: it was heard before, and now it is not, or sleeps.
    """

    prefill_tokens: float = 0.0
    requests: float = 0.0
    waiting: float = 0.0
    usage: float = -1.0
    stale: bool = True
    silent: bool = False


def saturation(loads: Sequence[Load]) -> float:
    """Return how full endpoints are on average: from 1 on, requests that may be refused are.

    An endpoint counts by what is nearer to its limit: five requests that wait, or 80 % of its KV cache in use.
    """
    fullness = [max(load.waiting / _FULL_WAITING, load.usage / _FULL_USAGE, 0.0) for load in loads]
    return sum(fullness) / len(fullness) if fullness else 0.0


class LoadOptions(NamedTuple):
    """How load is kept.

    Attributes:
        stale_seconds: older reports are not used.
        tokens_per_second: prompt tokens that an endpoint computes in a second, until more is known.
        request_seconds: a request whose end nobody saw counts so long.
        most_requests: requests kept per endpoint; the oldest go first.
    """

    stale_seconds: float = 2.0
    tokens_per_second: float = 8_000.0
    request_seconds: float = 60.0
    most_requests: int = 10_000


class _Given:
    __slots__ = ("at", "prefilled", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.prefilled = False


class _Endpoint:
    """Requests given to one endpoint, and its report."""

    def __init__(self, tokens_per_second: float) -> None:
        self.report: EngineReport | None = None
        self.open: OrderedDict[str, _Given] = OrderedDict()
        self.since: deque[float] = deque()  # when requests were given that no report can show yet
        self.backlog = 0.0  # as of `at`, by rate alone
        self.at = 0.0
        self.outstanding = 0.0  # tokens of open requests whose first token was not seen
        self.rate = tokens_per_second
        self.moved = 0.0  # when the queue's head was last seen to move
        self.watched = float("-inf")
        self.refused = False  # nobody listens there

    def drained(self, now: float) -> float:
        """Return the queue as a rate alone tells it."""
        return max(0.0, self.backlog - self.rate * max(0.0, now - self.at))

    def queue(self, now: float) -> float:
        """Return the prompt tokens that wait."""
        if now - self.watched > _WATCHED_SECONDS:
            return self.drained(now)
        progress = self.rate * max(0.0, now - self.moved)
        return max(0.0, self.outstanding - min(progress, self._head()))

    def _head(self) -> float:
        """Return the tokens of the request that is computed now: no more than those can be done without a sign."""
        for given in self.open.values():
            if not given.prefilled:
                return given.tokens
        return 0.0

    def prefilled(self, request_id: str, now: float) -> None:
        """Take note of a first token: that request and all before it are computed."""
        if (found := self.open.get(request_id)) is None or found.prefilled:
            self.watched = now
            return
        done = 0.0
        for given in self.open.values():
            if not given.prefilled and given.at <= found.at:
                given.prefilled = True
                done += given.tokens
        begun = max(self.moved, found.at)
        if done and now > begun and self.watched > float("-inf"):
            self.rate += _LEARN * (done / (now - begun) - self.rate)
        self.outstanding = max(0.0, self.outstanding - done)
        self.moved = self.watched = now
        self.backlog, self.at = self.outstanding, now

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended or is given up."""
        given = self.open.pop(request_id, None)
        if given is not None and not given.prefilled:
            self.outstanding = max(0.0, self.outstanding - given.tokens)
            self.backlog = max(0.0, self.backlog - given.tokens)

    def settle(self, before: float) -> None:
        """Forget the prompts given before a moment at which the engine was idle."""
        for given in self.open.values():
            if not given.prefilled and given.at <= before:
                given.prefilled = True
                self.outstanding = max(0.0, self.outstanding - given.tokens)
        self.backlog, self.at = min(self.drained(before), self.outstanding), before


class LoadBook:
    """Load of all endpoints, by address."""

    def __init__(self, options: LoadOptions | None = None) -> None:
        self._options = options or LoadOptions()
        self._endpoints: dict[str, _Endpoint] = {}
        self._where: dict[str, str] = {}

    def _of(self, address: str) -> _Endpoint:
        found = self._endpoints.get(address)
        if found is None:
            found = self._endpoints[address] = _Endpoint(self._options.tokens_per_second)
        return found

    def reported(self, address: str, report: EngineReport) -> None:
        """Take an engine's report."""
        endpoint = self._of(address)
        if endpoint.report is not None and report.at < endpoint.report.at:
            return
        endpoint.report, endpoint.refused = report, False
        since = endpoint.since
        while since and since[0] <= report.at:
            since.popleft()
        if not report.running and not report.waiting:
            endpoint.settle(report.at - _SETTLE_SECONDS)

    def refused(self, address: str) -> None:
        """Take note that nobody listens at an endpoint; one that was never heard may have no metrics there."""
        endpoint = self._endpoints.get(address)
        if endpoint is not None and endpoint.report is not None:
            endpoint.refused = True

    def given(self, request_id: str, address: str, tokens: float, now: float) -> None:
        """Take note of a request that was sent to an endpoint, with the prompt tokens it has to compute there."""
        if request_id in self._where:
            self.ended(request_id)
        endpoint = self._of(address)
        if not endpoint.outstanding:
            endpoint.moved = now
        endpoint.backlog, endpoint.at = endpoint.drained(now) + tokens, now
        endpoint.outstanding += tokens
        endpoint.open[request_id] = _Given(tokens, now)
        endpoint.since.append(now)
        self._where[request_id] = address
        while len(endpoint.open) > self._options.most_requests:
            self.ended(next(iter(endpoint.open)))
        if len(endpoint.since) > self._options.most_requests:
            endpoint.since.popleft()

    def address_of(self, request_id: str) -> str:
        """Return where an open request was sent, empty when it is not known."""
        return self._where.get(request_id, "")

    def first_token(self, request_id: str, now: float) -> None:
        """Take note that a response has begun."""
        if (address := self._where.get(request_id)) is not None:
            self._of(address).prefilled(request_id, now)

    def ended(self, request_id: str) -> None:
        """Take note that a request is over."""
        if (address := self._where.pop(request_id, None)) is not None:
            self._of(address).remove(request_id)

    def expire(self, now: float) -> None:
        """Forget requests whose end nobody saw."""
        limit = now - self._options.request_seconds
        for endpoint in self._endpoints.values():
            while endpoint.open:
                request_id, given = next(iter(endpoint.open.items()))
                if given.at > limit:
                    break
                self.ended(request_id)
            while endpoint.since and endpoint.since[0] <= limit:
                endpoint.since.popleft()

    def keep(self, addresses: frozenset[str]) -> None:
        """Forget endpoints that are no more."""
        for address in [known for known in self._endpoints if known not in addresses]:
            for request_id in self._endpoints.pop(address).open:
                self._where.pop(request_id, None)

    def load(self, address: str, now: float) -> Load:
        """Return an endpoint's load."""
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            return Load()
        report = endpoint.report
        queue = endpoint.queue(now)
        if report is None:
            return Load(queue, len(endpoint.open))
        age = now - report.at
        silent = endpoint.refused or report.asleep or age > max(_SILENT_SECONDS, report.lasts)
        if age > max(self._options.stale_seconds, report.lasts):
            return Load(queue, len(endpoint.open), silent=silent)
        fresh = len(endpoint.since)
        waiting = report.waiting + fresh
        return Load(queue, report.running + waiting, waiting, report.usage, stale=False, silent=silent)

    def open_requests(self, address: str) -> int:
        """Return the requests that were given to an endpoint and whose end is not known."""
        endpoint = self._endpoints.get(address)
        return len(endpoint.open) if endpoint is not None else 0

    def rate(self, address: str) -> float:
        """Return the prompt tokens a second that an endpoint is taken to compute."""
        endpoint = self._endpoints.get(address)
        return endpoint.rate if endpoint is not None else self._options.tokens_per_second
