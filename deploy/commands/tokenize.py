"""``kvatlas tokenize``."""

from __future__ import annotations

import argparse
import json
from typing import Final

from kvatlas.deploy.commands import score
from kvatlas.scorer.v1 import scorer_pb2 as pb

_SHOWN_CHARACTERS: Final = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    score.add_connection(parser)
    parser.add_argument("--model", default="", help="model name, where a request names none")
    score.add_input(parser)
    parser.add_argument("--json", action="store_true", help="one JSON answer a line: tokens, count and text")


def run(args: argparse.Namespace) -> int:
    """Ask for every request and print the answers in order, one for each prompt."""
    with score.connect(args) as client:
        for where, request in score.requests_of(args):
            answer: pb.TokenizeResponse = score.ask(client, "Tokenize", where, request)
            for prompt in answer.prompts:
                if args.json:
                    found = {"tokens": list(prompt.tokens), "count": prompt.count, "text": prompt.text}
                    print(json.dumps(found, ensure_ascii=False), flush=True)
                else:
                    _print(prompt)
    return 0


def _print(prompt: pb.Tokenized) -> None:
    by = f" by the {prompt.tokenizer} tokenizer" if prompt.tokenizer else ""
    more = "" if len(prompt.text) <= _SHOWN_CHARACTERS else f" ... ({len(prompt.text)} characters)"
    print(f"{prompt.count} tokens{by}: {' '.join(map(str, prompt.tokens[:32]))}{' ...' if prompt.count > 32 else ''}")
    print(f"  {prompt.text[:_SHOWN_CHARACTERS]!r}{more}")
