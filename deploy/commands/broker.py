"""``kvatlas broker``: a real Apache Kafka on this machine, for development, tests and small deployments."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.brokers.kafka import KafkaNode, NodeState, read_state, stop_node
from kvatlas.deploy.brokers.security import Security
from kvatlas.deploy.cli import common

DEFAULT_DATA_DIR: Final = Path(".kvatlas/kafka")
_STATUS_NOT_RUNNING: Final = 3  # what service managers use for "not running"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser(
        "start",
        help="start a node: in the foreground until interrupted, or with --detach",
        description="Start one Kafka node, which stays in the foreground until it is interrupted unless --detach is "
        "given; so it does with --print-address. It is broker and controller (KRaft). Needs Java >= 17; its jars are "
        "fetched by Maven once and kept in the cache folder (KVATLAS_CACHE_DIR, default ~/.cache/kvatlas).",
    )
    _add_data_dir(start)
    start.add_argument("--ephemeral", action="store_true", help="fresh data folder, deleted at the end; a free port")
    start.add_argument("--port", type=int, help="port for clients; 0 takes a free one (default 9092, ephemeral 0)")
    start.add_argument(
        "--host", default="127.0.0.1", help="address to listen on and to tell clients (default %(default)s)"
    )
    start.add_argument("--heap", type=int, default=512, metavar="MB", help="heap of the JVM (default %(default)s)")
    start.add_argument("--detach", action="store_true", help="return once it is ready; stop it with `broker stop`")
    start.add_argument("--print-address", action="store_true", help="print the bootstrap address as the last line")
    start.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a Kafka property, repeatable")
    start.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for the start (default %(default)s)"
    )
    start.add_argument(
        "--users-file",
        type=Path,
        help="file of NAME:PASSWORD lines: SASL_SSL with SCRAM and ACLs instead of a plain listener",
    )
    start.add_argument(
        "--super-user", action="append", default=[], metavar="NAME", help="user without ACLs, repeatable"
    )
    for name, text in (("stop", "stop the node of a data folder"), ("status", "say whether a node runs and where")):
        action = actions.add_parser(name, help=text, description=text.capitalize() + ".")
        _add_data_dir(action)
        if name == "status":
            action.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help=f"the node's folder (default {DEFAULT_DATA_DIR})")


def run(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code (`status` of no node: 3)."""
    if args.action == "start":
        return _start(args)
    data_dir = args.data_dir or DEFAULT_DATA_DIR
    if args.action == "stop":
        state = stop_node(data_dir)
        print(f"stopped the broker at {state.bootstrap} (pid {state.pid})")
        return 0
    return _status(data_dir, as_json=args.json)


def _status(data_dir: Path, *, as_json: bool) -> int:
    state = read_state(data_dir)
    if as_json:
        print(json.dumps({"running": state is not None} | ({} if state is None else _shown(state))))
    elif state is None:
        print(f"no broker is running with data in {data_dir}")
    else:
        print(f"Kafka {state.version} runs at {state.bootstrap} (pid {state.pid}, data in {data_dir})")
    return 0 if state is not None else _STATUS_NOT_RUNNING


def _shown(state: NodeState) -> dict[str, object]:
    return {
        "bootstrap": state.bootstrap,
        "pid": state.pid,
        "version": state.version,
        "ephemeral": state.ephemeral,
        "certificate": state.certificate,
    }


def _start(args: argparse.Namespace) -> int:
    if args.ephemeral and args.data_dir:
        raise SettingsError("--ephemeral makes its own data folder; leave out --data-dir")
    port = args.port if args.port is not None else (0 if args.ephemeral else 9092)
    if args.ephemeral or read_state(args.data_dir or DEFAULT_DATA_DIR) is None:
        _check_port(args.host, port)
    node = KafkaNode(
        None if args.ephemeral else args.data_dir or DEFAULT_DATA_DIR,
        port=port,
        host=args.host,
        heap_mb=args.heap,
        properties=_properties(args.set),
        security=_security(args.users_file, tuple(args.super_user)),
        start_timeout_seconds=args.timeout,
        detached=args.detach,
    )
    if args.detach:
        node.start()
        _announce(node, args.print_address)
        return 0
    return _foreground(node, print_address=args.print_address)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken at once: the JVM takes seconds to find out."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise SettingsError(
                f"cannot listen on {host}:{port}: {reason}; give another --port, 0 for a free one"
            ) from error


def _foreground(node: KafkaNode, *, print_address: bool) -> int:
    """Run until SIGINT or SIGTERM, or until the broker ends by itself (exit code 1)."""
    asked = common.stop_event()
    try:
        node.start()
        _announce(node, print_address)
        while not asked.wait(0.2):
            if not node.running:
                print(f"kvatlas broker: Kafka ended by itself; its log ends:\n{node.log_tail()}", file=sys.stderr)
                return 1
    finally:
        node.stop()
    return 0


def _announce(node: KafkaNode, print_address: bool) -> None:
    print(
        f"kvatlas broker: Kafka is ready at {node.bootstrap} (pid {node.pid}, data in {node.data_dir})", file=sys.stderr
    )
    if node.certificate is not None:
        print(f"kvatlas broker: clients trust {node.certificate} (ssl_cafile)", file=sys.stderr)
    if print_address:
        print(node.bootstrap, flush=True)


def _properties(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set {pair!r} is not KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def _security(users_file: Path | None, super_users: tuple[str, ...]) -> Security | None:
    if users_file is None:
        if super_users:
            raise SettingsError("--super-user needs --users-file")
        return None
    try:
        lines = users_file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise common.file_error("--users-file", users_file, error) from error
    users = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, password = line.strip().partition(":")
        if not separator:
            raise SettingsError(f"--users-file {users_file}, line {number} is not NAME:PASSWORD")
        users[name] = password
    try:
        return Security(users=users, super_users=super_users)
    except ValueError as error:
        raise SettingsError(f"--users-file {users_file}: {error}") from error
