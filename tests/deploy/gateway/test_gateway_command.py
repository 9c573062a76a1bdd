"""``kvatlas gateway`` says that it is ready once a picker is heard, or that none is."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvatlas.deploy.commands import gateway


class Pickers:
    """Health of the pickers as Envoy tells it, look by look."""

    def __init__(self, *healthy: int) -> None:
        self._healthy = list(healthy)
        self.looks = 0

    @property
    def healthy_pickers(self) -> int:
        self.looks += 1
        return self._healthy.pop(0) if len(self._healthy) > 1 else self._healthy[0]

    def check(self) -> None:
        """Envoy runs."""


def heard(envoy: Any, stop: threading.Event | None = None) -> bool:
    return gateway._heard(envoy, stop or threading.Event())


def test_ready_waits_for_the_first_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_LOOK_SECONDS", 0.0)
    late = Pickers(0, 0, 1)
    assert heard(late)
    assert late.looks == 3


def test_ready_does_not_wait_for_ever_nor_past_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_PICKER_SECONDS", -1.0)
    assert not heard(Pickers(0))
    monkeypatch.setattr(gateway, "_PICKER_SECONDS", 600.0)
    stopped = threading.Event()
    stopped.set()
    assert not heard(Pickers(0), stopped)
