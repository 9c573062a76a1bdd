"""What the tests of the whole pipeline share: `kvatlas` processes, recorded engines, and scores through the command."""

from __future__ import annotations

import gzip
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from kvatlas.bridge.engines.publisher import EnginePublisher

DATA = Path(__file__).parents[1] / "data" / "captures"
MODEL = "demo-model"
PODS = ("pod-a", "pod-b")
#: Every recording with a truth, by its path below `DATA`.
RECORDINGS = sorted(
    str(path.relative_to(DATA)).removesuffix(".truth.json.gz") for path in DATA.rglob("*.truth.json.gz")
)


class Service:
    """A `kvatlas` command in a process of its own; a worker without its supervisor, so that signals reach it.

    Attributes:
        log: file of its standard error.
        line: its ready line, once it has come.
    """

    def __init__(self, log: Path, *words: str, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.line = ""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        if words[0] == "worker":
            words = ("worker", "--no-supervise", *words[1:])
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvatlas.deploy", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ready(self, timeout: float = 150.0) -> str:
        """Wait for the ready line; returns the address in it."""
        line = self.line = self._lines.get(timeout=timeout)
        found = re.match(r"ready \S*?(?:scorer|worker|metrics|mirror)=(\S*)|ready bridge metrics=(\S*)", line)
        assert found, f"no ready line but {line!r}; log:\n{self.tail()}"
        return found[1] or found[2] or ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float = 90.0) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout)

    def tail(self) -> str:
        """End of the log."""
        return self.log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """Make sure that nothing stays: SIGTERM, then SIGKILL."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()


class RecordedEngine:
    """An engine that plays a recorded stream, with its replay socket."""

    def __init__(self, recording: str) -> None:
        packed = gzip.decompress((DATA / f"{recording}.frames.gz").read_bytes())
        self.payloads = [payload for _, _, payload in msgpack.Unpacker(io.BytesIO(packed), raw=True)]
        truth = json.loads(gzip.decompress((DATA / f"{recording}.truth.json.gz").read_bytes()))
        self.pod, self.queries = truth["pod"], truth["queries"]
        self._options = "".join(f",{name}={truth[name]}" for name in ("engine", "announcements") if name in truth)
        self.publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=truth["topic"])
        self.publisher.start()

    @property
    def flag(self) -> str:
        """What `--engine` takes."""
        return f"--engine={self.publisher.endpoint},{self.publisher.replay_endpoint}{self._options}"

    def play(self, first: int = 0, last: int | None = None) -> None:
        """Publish messages of the recording."""
        for payload in self.payloads[first:last]:
            self.publisher.publish_raw(payload)

    def close(self) -> None:
        """Close the sockets."""
        self.publisher.close()


def score(address: str, requests: Sequence[Mapping[str, Any]], folder: Path, model: str = MODEL) -> list[Any]:
    """Ask for scores through `kvatlas score`; returns the answers in the order of the requests."""
    file = folder / "requests.jsonl"
    file.write_text("".join(json.dumps(dict(request)) + "\n" for request in requests))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvatlas.deploy", "score"),
            *("--scorer", address, "--model", model, "--input", str(file), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wrong_hits(address: str, engines: Sequence[RecordedEngine], folder: Path) -> list[tuple[str, int, int]]:
    """Return (pod, recorded hit, matched tokens) of every recorded query that is scored otherwise, -1 for in part."""
    asked = [(engine.pod, query) for engine in engines for query in engine.queries]
    told = ("tokens", "cache_salt", "lora", "multimodal")
    requests = [{name: query[name] for name in told if query.get(name)} for _, query in asked]
    answers = score(address, requests, folder)
    assert len(answers) == len(asked)
    found = []
    for (pod, query), answer in zip(asked, answers, strict=True):
        # A lookup that missed its deadline on a busy machine says so, and is to be asked again.
        partial = answer["freshness"]["partial"]
        matched = -1 if partial else answer["scores"].get(pod, {}).get("matched_tokens", 0)
        if matched != query["hit_tokens"]:
            found.append((pod, query["hit_tokens"], matched))
    return found


def eventually(look: Callable[[], Any], timeout: float = 120.0, every: float = 0.5) -> Any:
    """Look until nothing is found (an empty or zero result); returns the last look."""
    deadline = time.monotonic() + timeout
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(every)
    return found


def children_of(pid: int) -> dict[str, int]:
    """Return the services that a launcher runs: name -> process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if parent == pid and "kvatlas.deploy.processes.child" in words:
            found[words[words.index("kvatlas.deploy.processes.child") + 1]] = int(path.parent.name)
    return found


def running(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
