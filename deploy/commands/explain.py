"""``kvatlas explain``."""

from __future__ import annotations

import argparse
import json

from google.protobuf.json_format import MessageToDict

from kvatlas.deploy.commands import score
from kvatlas.scorer.v1 import scorer_pb2 as pb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    score.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Explain every request."""
    with score.connect(args) as client:
        for where, request in score.requests_of(args):
            response: pb.ExplainResponse = score.ask(client, "Explain", where, request)
            if args.json:
                print(json.dumps(MessageToDict(response, preserving_proto_field_name=True)), flush=True)
            else:
                _print(response)
    return 0


def _print(response: pb.ExplainResponse) -> None:
    for block in response.blocks:
        held = ", ".join(
            f"{h.pod} {h.tier}" + (f"/g{h.group}" if h.group else "") + ("" if h.state == "live" else f" ({h.state})")
            for h in block.holders
        )
        text = held or ("nobody" if block.answered else "no answer")
        print(f"block {block.number:5} {block.key} partition {block.partition:3}: {text}")
    for pod, end in sorted(response.walks.items(), key=lambda item: -item[1].matched_blocks):
        print(f"{pod}: {end.matched_blocks} blocks; {end.reason}")
