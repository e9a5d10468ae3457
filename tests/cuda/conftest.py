"""The CUDA kernels: on a GPU where there is one, else emulated; without either, skipped."""

from __future__ import annotations

import pytest

from tests.ops.cases import CUDA, GPU


@pytest.fixture
def cuda():
    """The device that the kernels run on here."""
    if not CUDA.usable:
        pytest.skip(f"no CUDA kernels: {CUDA.detail}")
    return "cuda" if GPU else "cpu"
