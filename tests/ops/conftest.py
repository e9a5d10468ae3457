"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch

from tests.ops import cases
from variator_kernels import extension
from variator_kernels.ops import fast_norm, prepack, rows_linear
from variator_kernels.ops.grouped_attention import cpu
from variator_kernels.ops.int8_linear import kernels
from variator_kernels.ops.packed import cache


@pytest.fixture
def threads(request):
    """Kernels share their work among so many (indirect parameter), or two; a worker of `make test`
    has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(request, monkeypatch):
    """One way of grouped_attention's CPU kernel, whatever it would choose (indirect parameter)."""
    monkeypatch.setattr(cpu, "PATH", request.param)
    return request.param


@pytest.fixture(params=["tracked", "read"])
def rule(request, monkeypatch):
    """How the cache of packed weights notices writes: by the pages that the kernel of the operating
    system reports, or by reading the weights."""
    why = extension.load().why_not_tracked()
    if request.param == "tracked" and why:
        pytest.skip(f"written pages are not reported here: {why}")
    monkeypatch.setattr(cache, "track", request.param == "tracked")
    return request.param


@pytest.fixture
def own_products(monkeypatch):
    """Products are this package's own, whatever would be the faster one here."""
    before, threads = cases.CPU.active_isa(), torch.get_num_threads()
    monkeypatch.setattr(rows_linear, "takes", lambda *_: True)
    monkeypatch.setattr(kernels, "_choice", lambda isa: kernels.Choice(kernels.own(isa)))
    monkeypatch.setattr(prepack, "EMULATED", frozenset())
    with torch.no_grad():
        yield
    cases.CPU.set_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture
def own_norms(monkeypatch):
    """Of sublayers in steps too, where PyTorch's would run: they sum in another order."""
    monkeypatch.setattr(fast_norm, "in_one_pass", lambda norm, _: norm.weight is not None)
