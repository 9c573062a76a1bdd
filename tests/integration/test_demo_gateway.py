"""The gateway's demonstration as a whole: Envoy, picker, pipeline, simulated engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_chats_arrive_where_their_prefix_is(tmp_path: Path) -> None:
    """Later turns go to the pod that holds the conversation, and predicted cached tokens equal the engine's."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvatlas.deploy", "demo-gateway", "--conversations", "4", "--turns", "3"),
            # The machine may be busy with other tests: what is checked is where requests go, not how fast.
            *("--picker-deadline-ms", "20000", "--state-dir", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 later turns went to the pod" in done.stdout
    assert "equal the engine's for 8 of 8 later turns" in done.stdout
