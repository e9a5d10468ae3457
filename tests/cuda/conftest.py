"""The CUDA kernels: on a GPU where there is one, else emulated; without either, skipped."""

from __future__ import annotations

import pytest

from tests.ops.cases import CUDA, GPU


def pytest_collection_modifyitems(items):
    for item in items:
        if GPU and "tests/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cuda():
    """The device that the kernels run on here."""
    if not CUDA.usable:
        pytest.skip(f"no CUDA kernels: {CUDA.detail}")
    return "cuda" if GPU else "cpu"
