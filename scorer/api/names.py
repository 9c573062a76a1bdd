"""Served names: aliases of models, and adapters (LoRA) named as the model, as OpenAI clients name them.

One model may have several names: the path or name that its engines serve it under, which is in their topics and so in
block keys, and the names that clients use. An adapter's blocks lie under its base model and its own name. Who is an
adapter is learnt from the events of its pods, or set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.errors import InputError

#: Between a pod's name and its data-parallel rank in a pod id.
_RANK: Final = "@dp"


class ServedModels(Protocol):
    """What pods tell of names."""

    def is_model(self, name: str) -> bool:
        """Whether a pod serves a model of this name."""

    def bases_of(self, adapter: str) -> Sequence[str]:
        """Return the models of which pods have announced blocks of an adapter."""


def pairs(entries: Sequence[str], setting: str) -> dict[str, str]:
    """Read a setting of ``NAME=MODEL`` entries.

    Raises:
        SettingsError: an entry has another form, or a name stands for two models.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, model = entry.partition("=")
        if not (name and equals and model):
            raise SettingsError(f"[scorer] {setting}: {entry!r} is not NAME=MODEL")
        if found.setdefault(name, model) != model:
            raise SettingsError(f"[scorer] {setting}: {name!r} stands for {found[name]!r} and for {model!r}")
    return found


def also_named(aliases: Mapping[str, str]) -> Callable[[str], tuple[str, ...]]:
    """Return what gives a model's other names, for tokenizers that are known by one of them."""
    names: dict[str, list[str]] = {}
    for name, model in aliases.items():
        names.setdefault(model, []).append(name)
    return lambda model: tuple(names.get(model, ()))


class ServedNames:
    """Turns the model and adapter of a request into those of block keys."""

    def __init__(self, aliases: Sequence[str], adapters: Sequence[str], served: Callable[[], ServedModels]) -> None:
        """Read the settings.

        Raises:
            SettingsError: an entry is not NAME=MODEL.
        """
        self._aliases = pairs(aliases, "aliases")
        self._adapters = pairs(adapters, "adapters")
        self._served = served

    def resolve(self, model: str, lora: str) -> tuple[str, str]:
        """Return the model as its engines call it, and the adapter (empty for none).

        A name is taken for an alias first, then for a model that pods serve, then for an adapter. One that nobody
        knows stays what it is.

        Raises:
            InputError: it is an adapter of several models.
        """
        if (alias := self._aliases.get(model)) is not None:
            model = alias
        if lora or not model:
            return model, lora
        if (base := self._adapters.get(model)) is not None:
            return self._aliases.get(base, base), model
        served = self._served()
        if served.is_model(model):
            return model, ""
        bases = served.bases_of(model)
        if len(bases) > 1:
            raise InputError(
                f"model: {model!r} is an adapter of {' and of '.join(map(repr, bases))}: name the model, and the "
                f"adapter in lora (or set adapters)"
            )
        return (bases[0], model) if bases else (model, "")


def plain_name(pod: str) -> str:
    """Return a pod's name without its rank: what its engines' topics call it."""
    name, rank, number = pod.rpartition(_RANK)
    return name if rank and number.isdecimal() and name else pod


def ranks_of(wanted: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return which pods a caller means that knows no ranks: pod id -> name that the caller used.

    A name means the pod of that id, and all ranks under it: an engine with ranks that names each by its own port has
    ``10.0.0.7:8001@dp1`` for what routers call ``10.0.0.7:8001``. Without names every pod answers, under its plain one.
    """
    if not wanted:
        return {pod: plain_name(pod) for pod in known}
    names = set(wanted)
    found = {name: name for name in names}
    for pod in known:
        if pod not in names and (plain := plain_name(pod)) in names:
            found[pod] = plain
    return found
