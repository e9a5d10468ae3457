"""Every test runs with memory from torch.empty filled with NaN, so an unwritten output shows."""

from __future__ import annotations

import gc

from tests import emulation, interpreter

interpreter.enable()
emulation.enable()

import pytest  # noqa: E402  (nothing may import Triton before)
import torch  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest first: a worker that begins with one at the end is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What all these imports made stays for good. Trainers and benchmarks collect garbage at each
    of their beginnings, and would go through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_empty():
    torch.manual_seed(0)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
