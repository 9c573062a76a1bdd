"""One future for a transfer that several tasks carry out."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from kvatlas.connector.outcome import Results


class Gather:
    """Collects per-key results of a number of tasks; the future ends with the last of them.

    Attributes:
        future: the results together; cannot be cancelled, since buffers are in use until it ends.
    """

    def __init__(self, tasks: int) -> None:
        self.future: Future[Results] = Future()
        self.future.set_running_or_notify_cancel()
        self._results: Results = {}
        self._left = tasks
        self._lock = threading.Lock()
        if not tasks:
            self.future.set_result({})

    def add(self, results: Results) -> None:
        """Note one task's results."""
        with self._lock:
            self._results.update(results)
            self._left -= 1
            last = self._left == 0
        if last:
            self.future.set_result(self._results)
