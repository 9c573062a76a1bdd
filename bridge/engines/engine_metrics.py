"""Load in an engine's own words: its Prometheus page, by vLLM's and SGLang's names, and SGLang's load socket. Pure.

With several series of a name (data-parallel ranks behind one port) waiting and running are summed and usage is
averaged; given a rank, only the series of that rank count.

A message of the load socket is ``[b"load", sequence, payload]`` with the msgpack array ``["LoadStat", running, waiting,
tokens in use, tokens of capacity (0 unknown), rank, ...]``, sent on change and once a second else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.engines.facts import labels_of
from kvatlas.bridge.model.loads import ASKED, CACHE_USAGE, FOUND, RUNNING, WAITING


class EngineLoad(NamedTuple):
    """What a page says; None where it lacks the figure.

    ``asked`` and ``found`` are tokens of its prefix cache; ``awake`` is 0 where weights or cache are off the GPU.
    """

    running: float | None = None
    waiting: float | None = None
    usage: float | None = None
    asked: float | None = None
    found: float | None = None
    awake: float | None = None

    @property
    def known(self) -> bool:
        """Whether it says anything of load; hits alone are none."""
        return self[:3] != (None, None, None)

    def named(self) -> dict[str, float]:
        """Return what it says by the names of a pod's record, usage to a thousandth: less is no news."""
        usage = None if self.usage is None else round(self.usage, 3)
        told = {RUNNING: self.running, WAITING: self.waiting, CACHE_USAGE: usage, ASKED: self.asked, FOUND: self.found}
        return {name: value for name, value in told.items() if value is not None}


#: Metric name -> field of the load, for both engines: their names do not clash.
_FIELDS: Final[Mapping[str, str]] = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "usage",
    "vllm:gpu_cache_usage_perc": "usage",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "usage",
    "vllm:prefix_cache_queries_total": "asked",
    "vllm:prefix_cache_hits_total": "found",
    "vllm:external_prefix_cache_hits_total": "found",
    "sglang:prompt_tokens_total": "asked",
    "sglang:cached_tokens_total": "found",
    "vllm:engine_sleep_state": "awake",
}
_OTHER_STATES: Final = ('sleep_state="weights', 'sleep_state="discard')  # of the same name, of which one is told as 1
_RANK_LABELS: Final = ("engine", "dp_rank")
_LINE: Final = re.compile(rf"^({'|'.join(_FIELDS)})(?:\{{([^}}\n]*)\}})?[ \t]+([^\s#]+)", re.MULTILINE)


def read_load(page: str, rank: int | None = None) -> EngineLoad:
    """Return the load that a metrics page tells.

    Args:
        page: its text.
        rank: data-parallel rank whose series count; None for all.
    """
    found: dict[str, list[float]] = {}
    for match in _LINE.finditer(page):
        name, labels, text = match.groups()
        if rank is not None and not _of_rank(labels or "", rank):
            continue
        if labels and any(other in labels for other in _OTHER_STATES):
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        if 0 <= value < math.inf:  # neither NaN nor nonsense
            found.setdefault(_FIELDS[name], []).append(value)
    usage = found.get("usage")
    sums = {field: sum(values) for field, values in found.items() if field != "usage"}
    return EngineLoad(**sums, usage=min(sum(usage) / len(usage), 1.0) if usage else None)


def read_stat(frames: Sequence[bytes]) -> EngineLoad | None:
    """Return the load that a message of SGLang's load socket tells, None for what is none."""
    if len(frames) != 3 or frames[0] != b"load":
        return None
    try:
        told = msgspec.msgpack.decode(frames[2], type=list[Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    figures = [float(figure) for figure in told[1:5] if isinstance(figure, int | float) and 0 <= figure < math.inf]
    if told[:1] != ["LoadStat"] or len(figures) != 4:
        return None
    running, waiting, used, capacity = figures
    return EngineLoad(running, waiting, min(used / capacity, 1.0) if capacity else None)


def _of_rank(labels: str, rank: int) -> bool:
    """Whether a series is of a rank; one without such a label is of every rank."""
    named = {name: value for name, value in labels_of(labels).items() if name in _RANK_LABELS}
    return not named or str(rank) in named.values()
