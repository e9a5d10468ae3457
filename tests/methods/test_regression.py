"""Reduced-rank regression against what plain least squares gives."""

import pytest
import torch

from variator_kernels.methods.variator.calibration import regression
from variator_kernels.methods.variator.calibration.regression import Moments, reduced_rank


def samples(seed, number=400, p=7, q=5, rank=2, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.Generator().manual_seed(99)
    weights = torch.randn(q, rank, generator=draw) @ torch.randn(rank, p, generator=draw)
    z = torch.randn(number, p, generator=generator) * torch.logspace(-1, 2, p) + 3
    t = z @ weights.T - 1 + noise * torch.randn(number, q, generator=generator)
    return z, t, torch.rand(number, 1, generator=generator) + 0.1


def moments(*triples, origin=None):
    z, t, _ = triples[0]
    made = Moments(*origin or (torch.zeros_like(z[0]), torch.zeros_like(t[0])))
    for triple in triples:
        made.add(*triple)
    return made


def test_streamed_moments_are_those_of_all():
    whole, parts = samples(0), moments(*(part for part in _cut(samples(0))))
    for a, b in zip(moments(whole).centred(), parts.centred(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    z, _, w = (x.double() for x in whole)
    mean = (w * z).sum(0) / w.sum()
    covariance = ((z - mean) * w).T @ (z - mean) / w.sum()
    torch.testing.assert_close(parts.centred()[2], covariance, rtol=1e-4, atol=1e-3)


def _cut(triple):
    return zip(*(part.split(150) for part in triple), strict=True)


def test_finds_a_map_of_its_rank(monkeypatch):
    monkeypatch.setattr(regression, "RIDGES", (0.0,))
    found = reduced_rank(moments(samples(0)), moments(samples(1)), 2)
    z, t, _ = samples(2)
    torch.testing.assert_close(found.predict(z), t, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(2), rtol=0, atol=1e-5)
    deviation = (z @ found.right.T).std(0)
    torch.testing.assert_close(found.deviation, deviation, rtol=0.2, atol=0)
    assert found.error < 1e-6 * float(t.square().sum(-1).mean())


def test_full_rank_is_weighted_least_squares(monkeypatch):
    monkeypatch.setattr(regression, "RIDGES", (0.0,))
    z, t, w = samples(0, noise=5.0)
    found = reduced_rank(
        moments((z[:200], t[:200], w[:200])), moments((z[200:], t[200:], w[200:])), 9
    )
    ones = torch.cat([z, torch.ones(len(z), 1)], -1).double()
    root = w.sqrt().double()
    expected = ones @ torch.linalg.lstsq(ones * root, t.double() * root).solution
    torch.testing.assert_close(found.predict(z).double(), expected, rtol=1e-3, atol=1e-2)


def test_the_error_is_that_on_what_is_held_out_and_decides_the_ridge(monkeypatch):
    monkeypatch.setattr(regression, "RIDGES", (1e-6, 3e-3, 10.0))
    few, held_out = samples(0, number=12, p=10, noise=20.0), samples(1, p=10, noise=20.0)
    found = reduced_rank(moments(few), moments(held_out), 5)
    z, t, w = held_out
    tried = []
    for ridge in regression.RIDGES:
        mean_z, mean_t, _, _ = moments(few).centred()
        predicted = (z - mean_z) @ regression._solve(moments(few), ridge) + mean_t
        tried.append(float((w * (predicted - t).square()).sum() / w.sum()))
    assert found.error == pytest.approx(min(tried), rel=1e-3)
    assert tried.index(min(tried)) == 1, "neither hardly any nor far too much"


def test_inputs_far_from_zero():
    """Squares in fp32 lose what a mean of a hundred deviations leaves of their digits."""
    z, t, w = samples(5, number=30_000, noise=0.5)
    z, z[:, 0] = z / z.std(0) + 100, 100.25
    parts = slice(0, 24_000), slice(24_000, None)

    def fitted(dtype, origin=None):
        cut = [[x[part].to(dtype) for x in (z, t, w)] for part in parts]
        return reduced_rank(*(moments(triple, origin=origin) for triple in cut), 2)

    near, exact = fitted(torch.float32, (z.mean(0), t.mean(0))), fitted(torch.float64)
    assert near.error == pytest.approx(exact.error, rel=0.05)  # 60 times it without the origin
    a, b = (float((fit.predict(z) - t).square().mean()) for fit in (near, exact))
    assert a == pytest.approx(b, rel=0.05)
