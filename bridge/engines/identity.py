"""Who sent a message: pod and model from the engine's topic, else from what is configured."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.model.pod_ids import pod_name

_PREFIX: Final = "kv"
_NAME_BYTES_MAX: Final = 512


class Identity(NamedTuple):
    """One ordered stream of events: its pod id, its model, and the data-parallel rank."""

    pod_id: str
    model: str
    rank: int


def parse_topic(topic: bytes) -> tuple[str, str] | None:
    """Split ``kv@<pod>@<model>``; None when a topic has another shape. The model may hold further ``@``."""
    if len(topic) > _NAME_BYTES_MAX:
        return None
    try:
        parts = topic.decode().split("@", 2)
    except UnicodeDecodeError:
        return None
    if len(parts) != 3 or parts[0] != _PREFIX or not parts[1] or not parts[1].isprintable():
        return None
    return parts[1], parts[2]


def identify(topic: bytes, rank: int | None, spec: EngineSpec) -> Identity:
    """Return whose message it is.

    Args:
        topic: first frame of the message.
        rank: data-parallel rank in the payload, None when it says none.
        spec: the endpoint it came from.
    """
    named = parse_topic(topic)
    pod, model = named or (spec.fallback_pod, "")
    number = spec.rank if spec.ranks > 1 or rank is None else rank
    # A name that is an address is one rank's own; numbering it again would say the same twice.
    if named is None and not spec.pod and spec.ranks == 1:
        number = 0
    return Identity(pod_name(pod, number, spec.ranks), model or spec.model, number)
