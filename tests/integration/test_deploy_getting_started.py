"""The page for newcomers: its commands, run as they stand, do what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvatlas.deploy.brokers.process import free_ports

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "getting-started.md"
#: Ports of the page that other tests may hold at the same time.
PORTS = ("8100", "50051", "9464")


def free_block(count: int) -> range:
    """Return ports in a row that were free a moment ago."""
    while True:
        (first,) = free_ports(1)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return range(first, first + count)


def run(script: str, folder: Path, **env: str) -> tuple[int, str]:
    """Run the commands of a page in a folder; returns the exit code, and what they printed and logged."""
    shell = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        output = "not done in time\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in folder.glob("*.out"))
    return shell.wait(), output + logs


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_the_commands_of_getting_started_work(tmp_path):
    """Broker, topics, pods, services, audit, a score of a prompt from the log, and a clean end."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    assert len(blocks) >= 6
    script = "".join(blocks)
    broker, *ports = free_ports(1 + len(PORTS))
    for shown, port in zip(PORTS, ports, strict=True):
        assert shown in script
        script = script.replace(shown, str(port))
    script = script.replace("kvatlas broker start", f"kvatlas broker start --port {broker}")
    script = script.replace("kvatlas score ", "kvatlas score --scorer 127.0.0.1:50051 ".replace("50051", str(ports[1])))
    script = re.sub(r"kvatlas (explain|pods)\b", rf"kvatlas \1 --scorer 127.0.0.1:{ports[1]}", script)
    try:
        code, output = run(
            script, tmp_path, KVATLAS_KAFKA_BROKERS=f"127.0.0.1:{broker}", KVATLAS_WORKER_LISTEN="127.0.0.1:0"
        )
    finally:
        state = tmp_path / "kafka" / "node.json"
        if state.exists():  # the script did not come to its end
            os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    assert code == 0, output[-6000:]
    assert " 0 ghosts, 0 missing" in output
    scores = [json.loads(line)["scores"] for line in output.splitlines() if line.startswith('{"scores"')]
    assert scores
    assert all(found for found in scores), "nobody holds a prompt that a pod has just served"
    truth = next(
        json.loads(line) for line in output.splitlines() if '"matched_blocks"' in line and '"scores"' not in line
    )
    pods = truth[0] if isinstance(truth, list) else truth
    assert {name: pod["matched_blocks"] for name, pod in scores[0].items()} == {
        name: pod["matched_blocks"] for name, pod in pods.items()
    }


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_the_commands_of_the_pickers_page_route_a_request(tmp_path):
    """From nothing to a request that went where its prefix is, and to the word of the engine about it."""
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", (DOCS / "picker.md").read_text(), flags=re.M | re.S))
    engines, serving, listen = free_block(4), free_block(2), free_ports(2)
    ours = {6001 + n: port for n, port in enumerate(engines)} | {8101 + n: port for n, port in enumerate(serving)}
    ours |= {9002: listen[0], 8080: listen[1]}
    assert all(str(port) in script for port in ours)
    script = re.sub(r"\b[689]\d{3}\b", lambda shown: str(ours[int(shown[0])]), script)
    code, output = run(
        script,
        tmp_path,
        KVATLAS_SCORER_LISTEN="127.0.0.1:0",
        KVATLAS_WORKER_LISTEN="127.0.0.1:0",
        KVATLAS_PICKER_DEADLINE_MS="1500",  # a machine that runs other tests too must not decide by load alone
    )
    assert code == 0, output[-6000:]
    # Of the last turn alone: on a busy machine an earlier one ends before the engine's word about it is known.
    told, _, _logs = output.partition("\n--- ")
    pod, last = re.findall(r"^x-sim-pod: (\S+)(.*?)(?=^x-sim-pod: |\Z)", told, re.M | re.S)[-1]
    assert re.findall(r'"cached_tokens": (\d+)', last) == ["192"], output[-6000:]
    assert re.findall(r"^the engine at ([^\n]*)", last, re.M) == [
        f"127.0.0.1:{serving[pod == 'pod-1']} answered 200, had 192 of 201 tokens cached (192 predicted: exact)"
    ]
