"""``kvatlas pods``."""

from __future__ import annotations

import argparse
import json

from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.model import records
from kvatlas.deploy.commands import score
from kvatlas.scorer.v1 import scorer_pb2 as pb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    score.add_connection(parser)
    parser.add_argument("--model", default="", help="only pods of this model")
    parser.add_argument("--all", action="store_true", help="also pods that are gone")
    parser.add_argument("--watch", action="store_true", help="go on with every change until interrupted")
    parser.add_argument("--json", action="store_true", help="one JSON object a pod and line")


def run(args: argparse.Namespace) -> int:
    """List the pods, then their changes with ``--watch``."""
    with score.connect(args) as client:
        if not args.json:
            print(f"{'POD':40} {'STATE':6} {'MODEL':30} {'SEQUENCE':>10} {'AGE s':>8} {'LOST':>6} COVERAGE")
        pods = (
            client.watch_pods(args.model, gone=args.all) if args.watch else client.list_pods(args.model, gone=args.all)
        )
        for pod in pods:
            _print(pod, as_json=args.json)
    return 0


def _print(pod: pb.PodInfo, *, as_json: bool) -> None:
    if as_json:
        fields = MessageToDict(pod, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(json.dumps(fields), flush=True)
        return
    age = f"{pod.age_ms / 1e3:8.1f}" if pod.age_ms >= 0 else "   never"
    print(
        f"{pod.pod:40} {pod.state:6} {pod.model:30} {pod.last_sequence:10} {age} {pod.lost:6} {_coverage(pod)}",
        flush=True,
    )


def _coverage(pod: pb.PodInfo) -> str:
    """Return how much of the engine's stream is known."""
    return f"{pod.coverage} from {pod.heard_from}" if pod.coverage == records.PARTIAL else pod.coverage or "unknown"
