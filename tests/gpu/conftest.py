"""Everything here needs a GPU; without one each test is skipped, and says so."""

from __future__ import annotations

import pytest
import torch

from variator_kernels import backends

TRITON = next(status for status in backends.status() if status.name == "triton")
REASON = None if torch.cuda.is_available() and TRITON.usable else f"no GPU: {TRITON.detail}"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if REASON:
                item.add_marker(pytest.mark.skip(reason=REASON))
