"""Fixtures of the op tests."""

from __future__ import annotations

import pytest

from variator_kernels.ops.grouped_attention import cpu


@pytest.fixture
def path(request, monkeypatch):
    """One way of grouped_attention's CPU kernel, whatever it would choose (indirect parameter)."""
    monkeypatch.setattr(cpu, "PATH", request.param)
    return request.param
