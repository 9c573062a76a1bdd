"""``kvatlas gateway``: a real Envoy before a picker."""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import yaml

from kvatlas.deploy.cli import common
from kvatlas.deploy.gateway.config import KINDS, GatewayOptions, document
from kvatlas.deploy.gateway.envoy import Envoy

_LOOK_SECONDS: Final = 0.5
#: How long "ready" waits for a picker; whoever starts it later is heard all the same.
_PICKER_SECONDS: Final = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "--picker", action="append", default=[], metavar="HOST:PORT", help="a picker process; repeatable"
    )
    parser.add_argument(
        "--pod", action="append", default=[], metavar="HOST:PORT", help="a pod's serving address; repeatable"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="override",
        help="full-duplex: dials any address the picker names; override, buffered, streamed: among --pod, with "
        "fallback when the picker is away (default override)",
    )
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="for clients (127.0.0.1:8080)")
    parser.add_argument("--admin", default="127.0.0.1:0", metavar="HOST:PORT", help="Envoy's own pages")
    parser.add_argument(
        "--observe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show responses to the picker through a filter that waits for nothing (default on)",
    )
    parser.add_argument("--picker-cafile", default="", metavar="FILE", help="CA of the pickers' certificate (PEM)")
    parser.add_argument("--picker-name", default="", metavar="NAME", help="name in that certificate (localhost)")
    parser.add_argument("--concurrency", type=common.at_least(1), default=1, help="Envoy's worker threads (1)")
    parser.add_argument("--envoy", default="", metavar="PATH", help="Envoy's binary (default: of kvatlas[gateway])")
    parser.add_argument("--print", action="store_true", help="print the configuration and end")


def run(args: argparse.Namespace) -> int:
    """Run until interrupted; prints ``ready gateway=HOST:PORT admin=HOST:PORT`` once it hears a picker."""
    options = GatewayOptions(
        kind=args.kind,
        pickers=args.picker,
        pods=args.pod,
        listen=args.listen,
        admin=args.admin,
        observe=args.observe,
        cafile=args.picker_cafile,
        server_name=args.picker_name,
    )
    made = document(options)
    if args.print:
        yaml.safe_dump(made, sys.stdout, sort_keys=False)
        return 0
    stop = common.stop_event()
    with tempfile.TemporaryDirectory(prefix="kvatlas-gateway-") as folder:
        envoy = Envoy(made, Path(folder), binary=args.envoy, concurrency=args.concurrency)
        envoy.start()
        try:
            if not _heard(envoy, stop):
                chosen = "requests are answered 503" if args.kind == "full-duplex" else "Envoy chooses the pod"
                print(
                    f"kvatlas gateway: no picker is healthy at {', '.join(args.picker)}; until one is, {chosen}",
                    file=sys.stderr,
                )
            print(f"ready gateway={envoy.address} admin={envoy.admin}", flush=True)
            while not stop.wait(_LOOK_SECONDS):
                envoy.check()
        finally:
            envoy.stop()
    return 0


def _heard(envoy: Envoy, stop: threading.Event) -> bool:
    """Wait for a picker that is healthy; returns whether there is one."""
    until = time.monotonic() + _PICKER_SECONDS
    while not envoy.healthy_pickers:
        envoy.check()
        if time.monotonic() > until or stop.wait(_LOOK_SECONDS / 5):
            return False
    return True
