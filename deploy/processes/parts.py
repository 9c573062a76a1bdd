"""The services as parts of a deployment: how each is opened, and what it says once it is ready.

Only the packages of the part that is opened are imported, so that a bridge needs no Faust and a scorer neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.cli import common

if TYPE_CHECKING:
    from kvatlas.bridge.model.topics import Topic
    from kvatlas.streams.options import WorkerSettings


class Service(Protocol):
    """What every service has."""

    ready: asyncio.Event

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often its process was started again."""

    async def start(self) -> None:
        """Start; may return before it is ready."""

    async def run_until(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set, or raise what ended it."""

    async def stop(self) -> None:
        """Stop; also what was only started in part."""


Open = Callable[[Mapping[str, Any], asyncio.Event, bool], Awaitable[Service | None]]


class Part(NamedTuple):
    """One kind of process.

    Attributes:
        sections: names of the settings that it takes.
        open: looks after rights and topics, unless that was done, and returns the service; None when it was stopped.
        ready: what the ready line says of a service.
    """

    sections: tuple[str, ...]
    open: Open
    ready: Callable[[Any], str]


async def _bridge(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.bridge.model.topics import DLQ, EVENTS, PODS, TOPICS  # noqa: PLC0415
    from kvatlas.bridge.relay.service import BridgeService  # noqa: PLC0415
    from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of  # noqa: PLC0415
    from kvatlas.deploy.brokers.topics import ensure_topics  # noqa: PLC0415

    settings, kafka = sections["bridge"], sections["kafka"]
    service = BridgeService(settings, kafka)  # first, since it finds wrong settings without Kafka
    if prepared:
        return service
    groups = [settings.group] if settings.ownership == "group" else []
    check = check_rights(kafka, rights_of("bridge", kafka, groups=groups), wait_seconds=START_SECONDS)
    if not await common.unless_stopped(stop, check):
        return None
    await ensure_topics(kafka, [topic for topic in TOPICS if topic.name in (EVENTS, DLQ, PODS)])
    return service


async def _worker(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.streams.service import WorkerService  # noqa: PLC0415

    settings = await _worker_settings(sections, stop, prepared, scores=False)
    return None if settings is None else WorkerService(settings, sections["kafka"])


async def _scoring_worker(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.deploy.processes.colocated import ScoringWorker  # noqa: PLC0415

    settings = await _worker_settings(sections, stop, prepared, scores=True)
    if settings is None:
        return None
    return ScoringWorker(settings, sections["kafka"], sections["scorer"], sections["tokenizer"])


async def _worker_settings(
    sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool, *, scores: bool
) -> WorkerSettings | None:
    from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of  # noqa: PLC0415
    from kvatlas.deploy.brokers.topics import ensure_topics  # noqa: PLC0415
    from kvatlas.deploy.reindex.catalog import configured  # noqa: PLC0415
    from kvatlas.streams.faust_app.app import group_of  # noqa: PLC0415

    settings: WorkerSettings = sections["worker"]
    kafka = sections["kafka"]
    if prepared:
        return settings
    version, groups = settings.index_version, [group_of(settings)]
    if settings.mirror:
        from kvatlas.streams.mirror.service import group_of_mirrors  # noqa: PLC0415

        groups.append(group_of_mirrors(settings))
    rights = rights_of("worker", kafka, app=settings.app, version=version, groups=groups)
    if scores:
        rights += rights_of("scorer", kafka)
    if not await common.unless_stopped(stop, check_rights(kafka, rights, wait_seconds=START_SECONDS)):
        return None
    if kafka.create_topics:
        await ensure_topics(kafka, _topics_of(settings))
    return await configured(kafka, settings)


def _topics_of(settings: WorkerSettings) -> tuple[Topic, ...]:
    """Return the topics that a worker makes where they are missing; `kvatlas reindex` makes those of new versions."""
    from kvatlas.bridge.model import topics  # noqa: PLC0415

    if settings.index_version == topics.BASE_VERSION:
        return (*topics.TOPICS, *topics.changelog_topics(settings.app))
    return tuple(topic for topic in topics.TOPICS if topic.name != topics.BLOCKS)


async def _scorer(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of  # noqa: PLC0415
    from kvatlas.scorer.service import ScorerService  # noqa: PLC0415

    kafka = sections["kafka"]
    service = ScorerService(sections["scorer"], kafka, tokenizer=sections.get("tokenizer"))
    if prepared:
        return service
    check = check_rights(kafka, rights_of("scorer", kafka), wait_seconds=START_SECONDS)
    return service if await common.unless_stopped(stop, check) else None


async def _picker(sections: Mapping[str, Any], _stop: asyncio.Event, _prepared: bool) -> Service | None:
    from kvatlas.deploy.processes.picking import ScorerWithPicker  # noqa: PLC0415

    return ScorerWithPicker(*(sections[name] for name in ("picker", "kafka", "scorer", "tokenizer")))


async def _scorer_with_picker(sections: Mapping[str, Any], _stop: asyncio.Event, _prepared: bool) -> Service | None:
    """Open scorer and picker; the picker answers while Kafka is away."""
    from kvatlas.deploy.processes.picking import ScorerWithPicker  # noqa: PLC0415

    return ScorerWithPicker(*(sections[name] for name in ("picker", "kafka", "scorer", "tokenizer")), serve=True)


async def _picking_worker(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.deploy.processes.colocated import ScoringWorker  # noqa: PLC0415
    from kvatlas.deploy.processes.picking import WorkerWithPicker  # noqa: PLC0415

    settings = await _worker_settings(sections, stop, prepared, scores=True)
    if settings is None:
        return None
    worker = ScoringWorker(settings, sections["kafka"], sections["scorer"], sections["tokenizer"])
    return WorkerWithPicker(sections["picker"], worker)


async def _console(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.deploy.brokers.rights import check_rights, rights_of  # noqa: PLC0415
    from kvatlas.deploy.console.server import ConsoleService  # noqa: PLC0415

    kafka = sections["kafka"]
    service = ConsoleService(sections["console"], kafka, sections["worker"], sections["picker"])
    if prepared:
        return service
    return service if await common.unless_stopped(stop, check_rights(kafka, rights_of("console", kafka))) else None


async def _mirror(sections: Mapping[str, Any], stop: asyncio.Event, prepared: bool) -> Service | None:
    from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of  # noqa: PLC0415

    try:
        from kvatlas.streams.mirror.service import MirrorService, group_of_mirrors  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError("the mirror needs Redis's client; install kvatlas[redis]") from error
    settings, kafka = sections["worker"], sections["kafka"]
    service = MirrorService(settings, kafka)
    if prepared:
        return service
    groups = [group_of_mirrors(settings)]
    rights = rights_of("mirror", kafka, app=settings.app, version=settings.index_version, groups=groups)
    return (
        service if await common.unless_stopped(stop, check_rights(kafka, rights, wait_seconds=START_SECONDS)) else None
    )


def _addresses(**names: str) -> Callable[[Any], str]:
    """Return what makes the ready line: a name -> attribute with the address; those without an address are left out."""

    def line(service: Any) -> str:
        found = ((name, getattr(service, attribute)) for name, attribute in names.items())
        return " ".join(f"{name}={address}" for name, address in found if address)

    return line


_SCORING: Final = ("kafka", "log", "scorer", "tokenizer")

PARTS: Final[Mapping[str, Part]] = {
    "bridge": Part(("kafka", "log", "bridge"), _bridge, lambda service: f"bridge metrics={service.address}"),
    "worker": Part(("kafka", "log", "worker"), _worker, _addresses(worker="address")),
    "scoring-worker": Part(
        (*_SCORING, "worker"), _scoring_worker, _addresses(worker="address", scorer="scorer_address")
    ),
    "picking-worker": Part(
        (*_SCORING, "worker", "picker"),
        _picking_worker,
        _addresses(worker="address", scorer="scorer_address", picker="picker_address"),
    ),
    "scorer": Part(_SCORING, _scorer, _addresses(scorer="address")),
    "scorer-with-picker": Part(
        (*_SCORING, "picker"), _scorer_with_picker, _addresses(picker="address", scorer="scorer_address")
    ),
    "picker": Part((*_SCORING, "picker"), _picker, _addresses(picker="address", metrics="telemetry_address")),
    "mirror": Part(("kafka", "log", "worker"), _mirror, _addresses(mirror="address")),
    "console": Part(("kafka", "log", "console", "worker", "picker"), _console, _addresses(console="address")),
}
