"""``kvatlas bridge``: the bridge until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import Final

from kvatlas.bridge.model.topics import DLQ, EVENTS, PODS, TOPICS
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import START_SECONDS, check_rights, rights_of
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.cli import common

HELP: Final = "subscribe to engines and put their events on Kafka"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "bridge", "log")


def run(args: argparse.Namespace) -> int:
    """Run the bridge; prints ``ready bridge`` once it is subscribed."""
    sections = common.load_sections(args)
    configure_logging(sections["log"], "bridge")
    try:
        import uvloop  # noqa: PLC0415 - only the process that runs a loop needs it
    except ImportError:
        return asyncio.run(_serve(sections["bridge"], sections["kafka"]))
    return uvloop.run(_serve(sections["bridge"], sections["kafka"]))


async def _serve(settings: BridgeSettings, kafka: KafkaSettings) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = BridgeService(settings, kafka)  # first, since it finds wrong settings without Kafka
    groups = [settings.group] if settings.ownership == "group" else []
    check = check_rights(kafka, rights_of("bridge", kafka, groups=groups), wait_seconds=START_SECONDS)
    if not await common.unless_stopped(stop, check):
        return 0
    await ensure_topics(kafka, [topic for topic in TOPICS if topic.name in (EVENTS, DLQ, PODS)])
    try:
        if not await common.unless_stopped(stop, service.start()):
            return 0
        tune_interpreter()
        print(f"ready bridge metrics={service.address}", flush=True)
        await service.run_until(stop)
    finally:
        await service.stop()
    return 0
