"""The GPU cases of ``kvatlas bench offload``, tried on the CPU and run on a device where there is one."""

from __future__ import annotations

import pytest

from kvatlas.deploy.bench._offload_gpu import gpu_cases

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gpu_cases_move_every_block_with_its_checksum(device: str) -> None:
    """Stores, loads, both at once and the product beside stores give a figure each; other bytes would be an error."""
    figures = list(gpu_cases(1, device=device, total=64 << 20))
    cases = [figure["case"] for figure in figures]
    both = [f"gpu-{way}-{size}" for size in ("2MB", "16MB") for way in ("store", "load", "both")]
    assert cases == [*both[:3], "gpu-matmul", *both[3:]]
    assert all(figure["value"] > 0 and figure["ratio"] > 0 for figure in figures)
