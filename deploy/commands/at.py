"""``kvatlas at``: the index as of a past moment, and answers from it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli.common import add_sections, at_least, file_error, load_sections, token_ids
from kvatlas.deploy.history import ask
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import FORMS, Moment, parse_moment
from kvatlas.deploy.history.rebuild import PastIndex, rebuild
from kvatlas.streams.resolve.resolver import ResolveOptions

QUESTIONS: Final = ("score", "explain", "pods", "save")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = f"MOMENT: {FORMS}. The state is the one before the record at that moment."
    parser.add_argument("moment", metavar="MOMENT", help="when")
    parser.add_argument("question", choices=QUESTIONS, help="what to ask; save keeps the state as a snapshot")
    parser.add_argument("--model", help="model name, with score and explain")
    parser.add_argument("--input", type=Path, help='JSON lines: {"tokens": [...], "cache_salt", "lora", "pods"}')
    parser.add_argument("--tokens", metavar="IDS", help="one prompt as token ids: 1,2,3")
    parser.add_argument("--cache-salt", help="with --tokens")
    parser.add_argument("--lora", help="with --tokens")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of text")
    add_rebuild_arguments(parser)
    add_sections(parser, "kafka", "log")


def add_rebuild_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a past state is rebuilt."""
    parser.add_argument("--block-size-tokens", type=at_least(1), default=16, help="canonical block size (default 16)")
    parser.add_argument(
        "--announcements", choices=("auto", "copies", "presence"), default="auto", help="as the workers run"
    )
    parser.add_argument("--strict-gaps", action="store_true", help="as the workers run")
    parser.add_argument("--clears", choices=("engine", "all", "gpu"), default="engine", help="as the workers run")
    parser.add_argument("--snapshots", type=Path, metavar="DIR", help="go on from the nearest saved state in DIR")


def check_snapshots(folder: Path | None, *, saving: bool = False) -> None:
    """See that the snapshots' folder is there, or can be made, before the log is read for it.

    Raises:
        SettingsError: it is missing, no folder, or cannot be written to.
    """
    if folder is None:
        if saving:
            raise SettingsError("save needs --snapshots DIR: where the state is kept")
        return
    if not saving and not folder.is_dir():
        raise SettingsError(f"--snapshots {folder}: no such folder; `kvatlas at MOMENT save` makes the first snapshot")
    if saving:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise file_error("--snapshots", folder, error) from error


def options_of(args: argparse.Namespace) -> ResolveOptions:
    """Return what the flags say about the meaning of events."""
    return ResolveOptions(
        block_size_tokens=args.block_size_tokens,
        announcements=args.announcements,
        strict_gaps=args.strict_gaps,
        clears=args.clears,
    )


def progress_to_stderr(what: str) -> Callable[[int, int], None] | None:
    """Return what shows progress on a terminal, None where nobody looks."""
    if not sys.stderr.isatty():
        return None
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - began, 1e-9)
        print(f"\r{what}: {done}/{total} messages, {rate:,.0f}/s", end="\r", file=sys.stderr, flush=True)

    return show


def run(args: argparse.Namespace) -> int:
    """Rebuild the state, answer, and leave nothing behind but a snapshot that was asked for."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    questions = list(_questions(args)) if args.question in ("score", "explain") else []
    check_snapshots(args.snapshots, saving=args.question == "save")
    moment = parse_moment(args.moment, time.time_ns() // 1_000_000)
    with tempfile.TemporaryDirectory(prefix="kvatlas-at-") as folder:
        past = asyncio.run(_rebuild(args, kafka, moment, Path(folder)))
        note_beginning(past)
        if args.question == "save":
            name = f"{time.time_ns()}"
            past.save(args.snapshots / name, kafka.brokers, kafka.topic("kv-events"))
            print(args.snapshots / name)
            return 0
        for row in _answers(args, past, questions):
            print(row)
        past.close(keep=False)
    return 0


def note_beginning(past: PastIndex) -> None:
    """Say on standard error where the log begins, if what was before it is not in the state."""
    if past.begins:
        where = ", ".join(f"{partition}/{offset}" for partition, offset in sorted(past.begins.items()))
        print(
            f"kv-events begins at {where}: what was stored before and not announced again is not in this state",
            file=sys.stderr,
        )


async def _rebuild(args: argparse.Namespace, kafka: KafkaSettings, moment: Moment, folder: Path) -> PastIndex:
    async with LogReader(kafka) as reader:
        return await rebuild(
            reader,
            kafka,
            moment,
            folder=folder,
            options=options_of(args),
            clock=time.time_ns,
            snapshots=args.snapshots,
            progress=progress_to_stderr("rebuilding"),
        )


def _questions(args: argparse.Namespace) -> Iterator[ask.Question]:
    if not args.model:
        raise SettingsError(f"{args.question} needs --model: block keys start from the model's name")
    if args.tokens:
        yield ask.Question(tokens=token_ids(args.tokens), cache_salt=args.cache_salt, lora=args.lora)
        return
    if args.input is None:
        raise SettingsError(f"{args.question} needs --tokens or --input FILE")
    try:
        lines = args.input.read_bytes().splitlines()
    except OSError as error:
        raise file_error("--input", args.input, error) from error
    for number, line in enumerate(lines, start=1):
        try:
            yield msgspec.json.decode(line, type=ask.Question)
        except msgspec.MsgspecError as error:
            raise SettingsError(f"{args.input} line {number}: {error}") from error


def _answers(args: argparse.Namespace, past: PastIndex, questions: list[ask.Question]) -> Iterator[str]:
    if args.question == "pods":
        found = ask.pods(past)
        yield from (json.dumps(pod) for pod in found) if args.json else _pod_rows(found)
    asked, rows = (ask.score, _score_rows) if args.question == "score" else (ask.explain, _explain_rows)
    with asyncio.Runner() as runner:
        for question in questions:
            answer = runner.run(asked(past, args.model, question))
            yield json.dumps(answer) if args.json else rows(answer)


def _pod_rows(found: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'pod':<24}{'state':<8}{'epoch':>22}{'sequence':>10}{'lost':>6}  model"
    for pod in found:
        epoch = f"{pod['epoch'] >> 32}.{pod['epoch'] & 0xFFFFFFFF}"
        yield (
            f"{pod['pod']:<24}{pod['state']:<8}{epoch:>22}{pod['last_sequence']:>10}{pod['lost']:>6}  {pod['model']}"
        )


def _score_rows(answer: dict[str, Any]) -> str:
    rows = [
        f"{name:<24}{found['score']:>9.2f}{found['matched_blocks']:>8} blocks{found['matched_tokens']:>8} tokens"
        for name, found in answer["scores"].items()
    ]
    return "\n".join(rows) or "no pod held the first block"


def _explain_rows(answer: dict[str, Any]) -> str:
    rows = [
        f"{row['number']:>5} {row['key']}  "
        + (", ".join(f"{one['pod']}:{one['tier']}({one['state']})" for one in row["holders"]) or "nobody")
        for row in answer["blocks"]
    ]
    return "\n".join([*rows, *(f"{pod}: {reason}" for pod, reason in answer["walks"].items())])
