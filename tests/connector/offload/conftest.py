"""Tests that need torch are collected only where it is: an environment of their own runs them (``-m torch``)."""

from __future__ import annotations

import importlib.util

collect_ignore = (
    ["test_bench_gpu.py", "test_engine.py", "test_transfer.py"] if importlib.util.find_spec("torch") is None else []
)
