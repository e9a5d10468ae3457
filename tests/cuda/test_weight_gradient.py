"""The weight gradients' kernel alone: every combination of columns, rows, shares and norms."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import masked, moved
from variator_kernels import extension
from variator_kernels.ops.arguments import NO_NORM, Norm
from variator_kernels.ops.cuda_weight_gradient import Left, NormedRows, weight_gradient
from variator_kernels.ops.gpu_arguments import gpu_groups
from variator_kernels.ops.groups import Keep, slots
from variator_kernels.ops.make_groups import make_groups

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(params=[None, 1, 3], ids=["shares as chosen", "1 share", "3 shares"])
def shares(request, monkeypatch, cuda):
    """In how many shares the groups are summed up; a few may be empty."""
    if request.param is not None:
        module = extension.load("cuda")
        monkeypatch.setattr(module, "gradient_shares", lambda *sizes: request.param)


class Case:
    """Inputs ``[rows, n, d]`` and their groups."""

    def __init__(self, rows, n, d, k, dtype=BF16, mask=None, keep_first=0, norm="none"):
        self.x = torch.randn(rows, n, d).to(dtype)
        if mask is not None:
            self.x[~mask] = float("nan")
        keep, on_device = Keep(keep_first), moved((self.x, mask), "cuda")
        found = make_groups(on_device[0], k, mask=on_device[1], backend="cuda", keep=keep)
        self.groups = gpu_groups(found, on_device[0])
        listed = found if keep_first else make_groups(self.x, k, mask=mask)
        self.token, self.real = (t.reshape(-1, k).cpu() for t in slots(listed))
        self.norm, self.moments = NO_NORM, None
        if norm != "none":
            weight, bias = torch.randn(2, d)
            self.norm = Norm(norm, weight, bias if norm == "layer" else None, 1e-6)
            moments = torch.rand(*self.real.shape, 2) + 0.5
            if norm == "rms":
                moments[..., 0] = 0
            # Nobody reads those of slots without a token.
            self.moments = moments.where(self.real[..., None], float("nan"))

    def check(self, left: Left) -> None:
        """Every sum is right, and the same when it is made again."""
        rows, of, normed = moved(
            (self.x.flatten(0, 1), left, NormedRows(self.norm, self.moments)), "cuda"
        )
        found, again = (weight_gradient(of, rows, self.groups, normed=normed) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        h, real = self._normed(), self.real
        if left.rows is not None:
            _close(found.rows, left.rows[self.token[real]].T, h[real])
        if left.scores is not None:
            for slot, sums in enumerate(found.scores):
                _close(sums, left.scores.T, h[:, slot])
        if left.ones:
            _close(found.ones, torch.ones(1, int(real.sum())), h[real])

    def _normed(self):
        """``[groups, k, d]`` in float64, zeros where there is no token."""
        h = self.x.flatten(0, 1).double()[self.token]
        if self.moments is not None:
            mean, rstd = self.moments.double().unbind(-1)
            h = (h - mean[..., None]) * rstd[..., None] * self.norm.weight.double()
            if self.norm.bias is not None:
                h = h + self.norm.bias.double()
        return h.where(self.real[..., None], 0.0)


def _close(found, left, right):
    """``left · right`` in float64. Rounding to TF32 changes a factor by at most 2^-11 of it, so a
    product by 2^-10; the sum's own rounding is less than the rest of what is allowed."""
    left, right = left.double(), right.double()
    assert found.shape == (len(left), right.shape[1])
    error = (found.cpu().double() - left @ right).abs()
    assert error.le(2**-9.5 * (left.abs() @ right.abs())).all()


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 16, 32])
@pytest.mark.parametrize(("r", "d"), [(0, 8), (1, 24), (20, 136), (64, 264), (130, 72)])
def test_rows_and_scores(shares, k, r, d):
    case = Case(2, 4 * k + 1, d, k, norm="rms")
    left = torch.randn(case.x[..., 0].numel(), r) if r else None
    case.check(Left(left, torch.randn(case.groups.total, k)))


@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty row"])
@pytest.mark.parametrize("keep_first", [0, 2])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_masks_and_kept_tokens(shares, mask, keep_first, norm):
    case = Case(3, 61, 40, 4, F16, masked(mask, 3, 61), keep_first, norm)
    case.check(Left(torch.randn(3 * 61, 8), torch.randn(case.groups.total, 4), ones=True))


@pytest.mark.parametrize(("rows", "n"), [(0, 5), (2, 0), (1, 1), (2, 3)])
def test_few_tokens(shares, rows, n):
    case = Case(rows, n, 24, 4)
    case.check(Left(torch.randn(rows * n, 8), torch.randn(case.groups.total, 4), ones=True))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("k", [2, 4])
def test_more_rows_than_are_looked_up_at_once(cuda, monkeypatch, order, k):
    """Stages and lists of tokens are used again, in either order of the emulation's threads."""
    monkeypatch.setenv("VARIATOR_EMULATION_ORDER", order)
    monkeypatch.setattr(extension.load("cuda"), "gradient_shares", lambda *sizes: 1)
    case = Case(1, 620 * k - 1, 24, k, norm="rms")
    case.check(Left(torch.randn(620 * k - 1, 4), torch.randn(case.groups.total, k)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_sums_over_groups(shares, dtype):
    """A group is one row, even where none of its tokens exists."""
    case = Case(2, 61, 72, 4, dtype, masked("empty row", 2, 61))
    total = case.groups.total
    left, u = torch.randn(total, 20), torch.randn(total, 72).to(dtype)
    found = weight_gradient(
        Left(moved(left, "cuda")), moved(u, "cuda"), case.groups, by_group=True
    ).rows
    _close(found, left.T, u)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gradients_of_any_size(cuda, size, dtype):
    """Neither too small nor too large for fp16: left factors keep the range of fp32."""
    case = Case(1, 61, 24, 4, dtype)
    case.check(Left(size * torch.randn(61, 8), size * torch.randn(case.groups.total, 4)))


def test_nan_stays_in_its_columns(cuda):
    case = Case(1, 61, 264, 4)
    left = torch.randn(61, 20)
    left[7, 3] = float("nan")
    case.x[0, 9, 130] = float("nan")
    rows, of = moved((case.x[0], Left(left)), "cuda")
    found = weight_gradient(of, rows, case.groups).rows.cpu().isnan()
    expected = torch.zeros(20, 264, dtype=torch.bool)
    expected[3], expected[:, 130] = True, True
    assert torch.equal(found, expected)


def test_one_launch(cuda, monkeypatch):
    """All slots, scores and rows together."""
    module, calls = extension.load("cuda"), []
    monkeypatch.setattr(module, "weight_gradient", lambda *a, **named: calls.append(named))
    case = Case(1, 61, 24, 4)
    left, rows = moved((Left(torch.randn(61, 8), torch.randn(16, 4)), case.x[0]), "cuda")
    weight_gradient(left, rows, case.groups)
    assert len(calls) == 1
