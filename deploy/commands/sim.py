"""``kvatlas sim``."""

from __future__ import annotations

import argparse
import sys
import threading
import time

import msgspec

from kvatlas.deploy.cli import common
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan, SimSettings
from kvatlas.deploy.sim.truth import TruthServer
from kvatlas.scorer.tokenization.options import TokenizerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "sim", "tokenizer")
    parser.add_argument(
        "--serve", action="store_true", help="serve the OpenAI API on every pod instead of sending traffic"
    )
    parser.add_argument(
        "--report-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="a line of figures every so often; 0 none",
    )
    parser.add_argument(
        "--exit-when-done",
        action="store_true",
        help="end after the traffic (default: keep answering until interrupted)",
    )
    parser.add_argument("--start-paused", action="store_true", help="send nothing before POST /resume")


def run(args: argparse.Namespace) -> int:
    """Run the fleet; prints ``ready engines=... truth=HOST:PORT`` on standard output once every socket is bound."""
    sections = common.load_sections(args)
    settings: SimSettings = sections["sim"]
    fleet = Fleet(SimPlan.of(settings), clock=time.time, monotonic=time.monotonic)
    truth = TruthServer(fleet, settings.truth_listen)
    stop = common.stop_event()
    if args.start_paused:
        fleet.pause()
    fleet.start()
    if args.serve:
        return _serve(fleet, truth, sections["tokenizer"], stop)
    try:
        truth.start()
        print(f"ready engines={';'.join(fleet.engines)} truth={truth.address}", flush=True)
        done = threading.Event()
        failed: list[Exception] = []
        thread = threading.Thread(target=_run, args=(fleet, stop, done, failed), name="sim-traffic")
        thread.start()
        _report(fleet, args.report_seconds, stop, done)
        if not args.exit_when_done and not failed:
            stop.wait()
        stop.set()
        thread.join()
        if failed:
            raise failed[0]
    finally:
        truth.stop()
        fleet.close()
    print(_figures(fleet), file=sys.stderr, flush=True)
    return 0


def _serve(fleet: Fleet, truth: TruthServer, tokenizer: TokenizerSettings, stop: threading.Event) -> int:
    """Serve requests until stopped; the ready line names the serving addresses as well."""
    from kvatlas.deploy.sim.serving import ServedFleet  # noqa: PLC0415 - only when it serves

    served = ServedFleet(fleet, tokenizer)
    try:
        truth.start()
        served.start()
        where = ";".join(served.endpoints())
        print(f"ready engines={';'.join(fleet.engines)} truth={truth.address} endpoints={where}", flush=True)
        stop.wait()
    finally:
        served.close()
        truth.stop()
        fleet.close()
    print(_figures(fleet), file=sys.stderr, flush=True)
    return 0


def _run(fleet: Fleet, stop: threading.Event, done: threading.Event, failed: list[Exception]) -> None:
    try:
        fleet.run(stop)
    except Exception as error:  # noqa: BLE001 - raised again on the main thread
        failed.append(error)
    finally:
        done.set()


def _report(fleet: Fleet, every_seconds: float, stop: threading.Event, done: threading.Event) -> None:
    last = time.monotonic()
    while not (stop.wait(0.1) or done.is_set()):
        if every_seconds and time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            print(_figures(fleet), file=sys.stderr, flush=True)


def _figures(fleet: Fleet) -> str:
    pods = fleet.status()
    total = {
        name: sum(pod.counts.get(name, 0) for pod in pods)
        for name in ("requests", "events", "batches", "stored", "removed", "prompt_tokens", "hit_tokens")
    }
    total["blocks_held"] = sum(pod.blocks for pod in pods)
    return msgspec.json.encode(total).decode()
