"""The page for newcomers: its commands, run as they stand, do what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "getting-started.md"
#: Ports of the page that other tests may hold at the same time.
PORTS = ("8100", "50051", "9464")


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
    return found


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
    shell = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KVATLAS_KAFKA_BROKERS": f"127.0.0.1:{broker}",
            "KVATLAS_WORKER_LISTEN": "127.0.0.1:0",
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        output = shell.communicate()[0]
    finally:
        state = tmp_path / "kafka" / "node.json"
        if state.exists():  # the script did not come to its end
            os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in tmp_path.glob("*.out"))
    assert shell.returncode == 0, output[-3000:] + logs
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
