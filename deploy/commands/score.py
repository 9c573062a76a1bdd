"""``kvatlas score``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.cli.common import file_error
from kvatlas.scorer.client import ScorerClient, channel_credentials, score_request
from kvatlas.scorer.errors import ClientError, InputError
from kvatlas.scorer.tokenization.requests import shape_of_body
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: Fields of a line with token ids; any other line is a body of an engine's API, with these beside it.
_KNOWN: Final = (
    "tokens",
    "lora",
    "cache_salt",
    "pods",
    "model",
    "request_id",
    "strategy",
    "usable_only",
    "multimodal",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    add_connection(parser)
    parser.add_argument("--model", default="", help="model name, where a request names none")
    add_input(parser)
    parser.add_argument("--json", action="store_true", help="one JSON answer a line, in the order of the requests")


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked."""
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="JSON lines, one request a line, as the client would send it to the engine (or with tokens, or with url "
        "and body as in a batch file); - reads standard input",
    )
    parser.add_argument(
        "--path",
        default="",
        metavar="PATH",
        help="path of the requests in --input, such as /v1/messages; default: told by their fields",
    )
    parser.add_argument("--prompt", help="ask about this text instead of --input")


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which scorer to ask."""
    parser.add_argument("--scorer", default="127.0.0.1:50051", metavar="ADDR", help="host:port or unix:PATH")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file that holds the bearer token")
    parser.add_argument("--tls", action="store_true", help="connect with TLS, trusting the machine's CAs")
    parser.add_argument("--tls-cafile", type=Path, metavar="FILE", help="connect with TLS, trusting this CA (PEM)")
    parser.add_argument("--tls-certfile", type=Path, metavar="FILE", help="own certificate for mutual TLS (PEM)")
    parser.add_argument("--tls-keyfile", type=Path, metavar="FILE", help="key of --tls-certfile (PEM)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="deadline of a request")


def connect(args: argparse.Namespace, *, token: str = "") -> ScorerClient:
    """Return the client that the flags describe; ``token`` is used instead of the file's where it is given.

    Raises:
        SettingsError: a file cannot be read, or flags contradict each other.
    """
    token = token or _read(args.token_file, "--token-file").decode(errors="replace").strip()
    return ScorerClient(args.scorer, token=token, credentials=_credentials(args), timeout_seconds=args.timeout)


def _credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if (args.tls_certfile is None) != (args.tls_keyfile is None):
        raise SettingsError("--tls-certfile and --tls-keyfile go together")
    if not args.tls and args.tls_cafile is None and args.tls_certfile is None:
        return None
    return channel_credentials(
        _read(args.tls_cafile, "--tls-cafile") or None,
        _read(args.tls_certfile, "--tls-certfile") or None,
        _read(args.tls_keyfile, "--tls-keyfile") or None,
    )


def _read(path: Path | None, flag: str) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(flag, path, error) from error


def requests_of(args: argparse.Namespace) -> Iterator[tuple[str, pb.ScoreRequest]]:
    """Yield the requests of ``--prompt`` or ``--input``, each with where it stands (``FILE:LINE``).

    Raises:
        SettingsError: the file cannot be read, or a line is no request; names the line.
    """
    if args.prompt is not None:
        yield "--prompt", score_request(args.model, prompt=args.prompt)
        return
    try:
        lines = sys.stdin if args.input == "-" else Path(args.input).open(encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise file_error("--input", args.input, error) from error
    with lines:
        for number, line in enumerate(_decoded(lines, args.input), 1):
            if line.strip():
                where = f"{args.input}:{number}"
                yield where, _request(line, args.model, args.path, where)


def _decoded(lines: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise SettingsError(f"--input {name}: not UTF-8: {error}") from error


def ask(client: ScorerClient, name: str, where: str, request: pb.ScoreRequest) -> Any:
    """Call an RPC with a request of :func:`requests_of`.

    Raises:
        ClientError: the scorer refused it or could not be reached; names the request.
    """
    try:
        return client.call(name, request)
    except ClientError as error:
        raise error.at(where) from error


def _request(line: str, model: str, path: str, where: str) -> pb.ScoreRequest:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SettingsError(f"{where}: not a request: a JSON object is wanted, found {line.strip()[:80]}")
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("pods"), str):  # it would count as a list of its letters
        raise SettingsError(f"{where}: pods: a list of pod names is wanted, not text")
    if "tokens" not in given:
        return _body(fields, model, path, where)
    if given.keys() - set(_KNOWN):
        raise SettingsError(f"{where}: not a request; beside tokens known fields are {', '.join(_KNOWN[1:])}")
    try:
        return score_request(given.pop("model", model), **given)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        raise SettingsError(f"{where}: {error}") from error


def _body(fields: dict[str, Any], model: str, path: str, where: str) -> pb.ScoreRequest:
    """Return a request with the body of one to an engine, as it is or as batch files have it."""
    if isinstance(fields.get("body"), dict):
        path, fields = str(fields.get("url") or path), fields["body"]
    try:
        if not path:
            shape_of_body(fields)
    except InputError as error:
        raise SettingsError(f"{where}: {error}; give one of these, or tokens") from error
    if model and not fields.get("model"):
        fields = {**fields, "model": model}
    return pb.ScoreRequest(request_json=json.dumps(fields), request_path=path)


def answer(response: pb.ScoreResponse) -> dict[str, Any]:
    """Return an answer as ``--json`` prints it."""
    found: dict[str, Any] = MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    freshness = found.setdefault("freshness", {})
    for name, default in (("partial", False), ("standby", False), ("partitions", []), ("pods", {})):
        freshness.setdefault(name, default)
    return found


def run(args: argparse.Namespace) -> int:
    """Ask for every request and print the answers in order."""
    with connect(args) as client:
        for where, request in requests_of(args):
            response: pb.ScoreResponse = ask(client, "Score", where, request)
            if args.json:
                print(json.dumps(answer(response)), flush=True)
            else:
                _print(response)
    return 0


def _print(response: pb.ScoreResponse) -> None:
    flags = "".join(
        text
        for on, text in ((response.freshness.partial, ", PARTIAL"), (response.freshness.standby, ", from a standby"))
        if on
    )
    print(f"{response.prompt_tokens} tokens, {response.blocks} blocks of {response.block_size_tokens}{flags}")
    for pod, entry in sorted(response.scores.items(), key=lambda item: (-item[1].score, item[0])):
        tiers = " ".join(f"{tier}={count}" for tier, count in sorted(entry.tiers.items()))
        print(f"  {pod:40} {entry.score:10.2f}  {entry.matched_tokens:8} tokens  {tiers}")
    if not response.scores:
        print("  no pod holds its beginning")
