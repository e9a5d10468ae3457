"""What a packed weight multiplies with, for tests of the cache of packed weights."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import needs_cpu
from variator_kernels.ops import prepack

marks = [needs_cpu, pytest.mark.usefixtures("threads", "rule")]
ROWS, COLUMNS = 160, 176  # 110 KiB: whole pages inside, and bytes at both ends outside of them


def product(weight):
    """What the packed weight multiplies with: the transposed weight itself, of an identity."""
    rows = torch.eye(weight.shape[1], dtype=weight.dtype)
    return prepack.linear(weight, None)(rows).t()


def same(weight):
    return torch.equal(product(weight), weight.detach())
