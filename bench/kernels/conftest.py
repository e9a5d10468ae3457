"""Fixtures of the cells: instruction set, dtype, ratio, direction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.kernels.cells import DIRECTIONS, DTYPES, RATIOS
from variator_kernels import extension


def instruction_sets() -> list[str]:
    """Those that the built kernels can use here; one that says why there are none."""
    kernels = extension.load()
    return list(kernels.available_isas()) if kernels else ["not built"]


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one instruction set for a cell."""
    kernels = extension.load()
    if kernels is None:
        pytest.skip(extension.why_missing())
    before = kernels.active_isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture(params=DTYPES, scope="session")
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=RATIOS, scope="session", ids=lambda k: f"k{k}")
def ratio(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=DIRECTIONS, scope="session")
def direction(request: pytest.FixtureRequest) -> str:
    return request.param
