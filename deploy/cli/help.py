"""What makes ``--help`` and wrong flags helpful: examples, short usage lines, and the flag that was meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, Final

#: Subcommand -> example calls; a test parses each of them.
EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "up": (
        "kvatlas up --engine tcp://10.0.0.5:5557,tcp://10.0.0.5:5558",
        "kvatlas up --brokers kafka:9092 --engine tcp://10.0.0.5:5557,pod=a,model=m --state-dir /var/lib/kvatlas",
    ),
    "demo": ("kvatlas demo",),
    "demo-gateway": ("kvatlas demo-gateway", "kvatlas demo-gateway --conversations 16 --turns 6"),
    "bridge": (
        "kvatlas bridge --brokers kafka:9092 --engines tcp://10.0.0.5:5557,tcp://10.0.0.5:5558",
        "kvatlas bridge --brokers kafka:9092 --kubernetes-selector app=vllm --listen 0.0.0.0:9464",
    ),
    "worker": (
        "kvatlas worker --brokers kafka:9092 --state-dir /var/lib/kvatlas",
        "kvatlas worker --brokers kafka:9092 --state-dir /var/lib/kvatlas --processes 4 --standbys 1",
    ),
    "scorer": (
        "kvatlas scorer --brokers kafka:9092 --listen 0.0.0.0:50051 --http-listen 0.0.0.0:8080",
        "kvatlas scorer --config /etc/kvatlas/kvatlas.toml --tls-certfile tls.crt --tls-keyfile tls.key",
    ),
    "picker": (
        "kvatlas picker --brokers kafka:9092 --listen 0.0.0.0:9002 --endpoints 10.0.0.5:8000,pod=vllm-0",
        "kvatlas picker --brokers kafka:9092 --listen 0.0.0.0:9002 --pool default/llama",
    ),
    "gateway": (
        "kvatlas gateway --picker 127.0.0.1:9002 --pod 10.0.0.5:8000 --pod 10.0.0.6:8000",
        "kvatlas gateway --picker picker:9002 --kind full-duplex --print",
    ),
    "score": (
        'kvatlas score --model NAME --prompt "You are a helpful assistant."',
        "kvatlas score --scorer scorer:50051 --model NAME --input prompts.jsonl --json",
    ),
    "tokenize": (
        'kvatlas tokenize --model NAME --prompt "You are a helpful assistant."',
        "kvatlas tokenize --scorer scorer:50051 --input requests.jsonl --path /v1/messages --json",
    ),
    "explain": ("kvatlas explain --scorer scorer:50051 --model NAME --input prompts.jsonl",),
    "pods": ("kvatlas pods --scorer scorer:50051 --watch", "kvatlas pods --all --json"),
    "sim": (
        "kvatlas sim --pods 4 --requests-per-second 20 --base-port 5600",
        "kvatlas sim --pods 8 --trace trace.jsonl.gz --exit-when-done",
        "kvatlas sim --pods 2 --serve --serve-port 8100 --tokenizer-models sim-model=/models/sim",
    ),
    "broker": (
        "kvatlas broker start --data-dir kafka --detach --print-address",
        "kvatlas broker start --ephemeral --users-file users.txt --super-user admin",
        "kvatlas broker stop --data-dir kafka",
    ),
    "console": (
        "kvatlas console --brokers kafka:9092 --scorer scorer:50051",
        "kvatlas console --brokers kafka:9092 --scorer scorer:50051 --listen 0.0.0.0:8090 --page-token-file token",
    ),
    "doctor": (
        "kvatlas doctor http://10.0.0.5:8000 --brokers kafka:9092 --scorer scorer:50051",
        "kvatlas doctor http://10.0.0.5:8000 --engines-only --json",
    ),
    "topics": (
        "kvatlas topics --brokers kafka:9092 --partitions 64 --replication 3",
        "kvatlas topics --brokers kafka:9092 --partitions 64 --check",
        "kvatlas topics --acls --account bridge=kv-bridge --account worker=kv-worker",
    ),
    "audit": (
        "kvatlas audit --brokers kafka:9092 --events",
        "kvatlas audit --truth http://127.0.0.1:8000/truth --pod pod-0 --json",
    ),
    "replay": (
        "kvatlas replay --since -15m --pod pod-a --type cleared",
        "kvatlas replay --since -1h --to incident.kvcap",
        "kvatlas replay --from incident.kvcap --json",
    ),
    "at": (
        "kvatlas at 2026-11-24T10:00:00Z pods",
        "kvatlas at -2h score --model NAME --input prompts.jsonl",
    ),
    "diff": ("kvatlas diff -2h -1h",),
    "why": ("kvatlas why REQUEST-ID --after 10",),
    "whatif": ("kvatlas whatif precise:4 approximate:8 round-robin --trace trace.jsonl.gz",),
    "top": (
        "kvatlas top --brokers kafka:9092 --scorer-metrics scorer-0:9464 --scorer-metrics scorer-1:9464",
        "kvatlas top --once --json",
    ),
    "reindex": (
        "kvatlas reindex start v2 --block-size-tokens 32",
        "kvatlas reindex status",
        "kvatlas reindex switch v2",
    ),
    "mirror": (
        "kvatlas mirror --brokers kafka:9092 --mirror redis://redis:6379/0",
        "kvatlas mirror --brokers kafka:9092 --mirror rediss://kvatlas@redis:6379/0 --mirror-password-file secret",
    ),
    "evictor": ("kvatlas evictor /mnt/kv --max-bytes 2t --interval 60",),
    "bench": ("kvatlas bench replay --json",),
    "config": ("kvatlas config --markdown",),
    "version": ("kvatlas version",),
}

_FIRST_STEPS: Final = """
first steps:
  kvatlas demo                    the whole pipeline on simulated pods
  kvatlas up --engine tcp://HOST:5557,tcp://HOST:5558
                                  the pipeline on this machine, over a real engine
  kvatlas COMMAND --help          settings and examples of one command
  kvatlas config                  every setting with its flag, environment variable and TOML key

Settings: flags win over environment variables (KVATLAS_SECTION_NAME), which win over the file of --config or
KVATLAS_CONFIG. Exit codes: 0 done, 1 failed (try again), 2 wrong use, settings or rights, or a full disk (trying
again does not help), 130 interrupted.
"""

#: A usage line with more flags than this says nothing.
_USAGE_FLAGS: Final = 12


class Parser(argparse.ArgumentParser):
    """An argument parser that takes ``-15m`` for a moment, and names the flag that was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What looks like a negative number is a value, and so are moments before now.
        self._negative_number_matcher = re.compile(r"^-\d+(\.\d+)?[a-z]{0,2}$")

    def error(self, message: str) -> None:  # type: ignore[override]
        """End with exit code 2 and a text that helps."""
        word = message.removeprefix("unrecognized arguments: ").split()[:1]
        if message.startswith("unrecognized") and word and word[0].startswith("-"):
            flag = word[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self.flags(), n=2, cutoff=0.6)
            message += f"; did you mean {' or '.join(near)}?" if near else f"; see `{self.prog} --help`"
        super().error(message)

    def flags(self) -> list[str]:
        """Return the flags of this parser."""
        return [option for action in self._actions for option in action.option_strings]


def polish(parser: argparse.ArgumentParser, name: str = "") -> None:
    """Shorten the usage line of a parser and put examples under its help; the first steps where it is the whole."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if not name:
        parser.epilog = _FIRST_STEPS
        return
    flags = [action for action in parser._actions if action.option_strings]
    if len(flags) > _USAGE_FLAGS:
        words = [*_required(flags), *_positionals(parser._actions)]
        parser.usage = " ".join(["%(prog)s", "[options]", *words])
    examples = "\n".join(f"  {line}" for line in EXAMPLES.get(name, ()))
    text = parser.epilog or ""
    if examples:
        parser.epilog = "\n".join(filter(None, ("examples:", examples, text and "\n" + text)))


def _required(flags: Iterable[argparse.Action]) -> list[str]:
    return [f"{flag.option_strings[0]} {flag.metavar or flag.dest.upper()}" for flag in flags if flag.required]


def _positionals(actions: Iterable[argparse.Action]) -> list[str]:
    shown = []
    for action in actions:
        if action.option_strings:
            continue
        word = action.metavar if isinstance(action.metavar, str) else action.dest
        if action.choices and not action.metavar:
            word = "{" + ",".join(map(str, action.choices)) + "}"
        shown.append(f"[{word} ...]" if action.nargs == "*" else word)
    return shown
