"""Ridge regression, of full and of limited rank, against what plain least squares gives."""

import pytest
import torch

from variator_kernels.methods.variator.calibration.regression import (
    Moments,
    reduced_rank,
    regression,
)


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


def predict(fit, fitted, z):
    """A map of limited rank, from what was fitted to."""
    _, mean_t, _, _ = fitted.centred()
    return (z - fit.mean_in) @ (fit.left @ fit.right).T + (fitted.origin_t + mean_t).to(z.dtype)


def test_finds_a_map_of_its_rank():
    fitted = moments(samples(0))
    found = reduced_rank(fitted, moments(samples(1)), 2, (0.0,))
    z, t, _ = samples(2)
    torch.testing.assert_close(predict(found, fitted, z), t, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(2), rtol=0, atol=1e-5)
    deviation = (z @ found.right.T).std(0)
    torch.testing.assert_close(found.deviation, deviation, rtol=0.2, atol=0)
    line = regression(fitted, moments(samples(1)), (0.0,))
    assert line.error < 1e-6 * float(t.square().sum(-1).mean())


@pytest.mark.parametrize("limited", [False, True])
def test_full_rank_is_weighted_least_squares(limited):
    z, t, w = samples(0, noise=5.0)
    fitted, held_out = moments((z[:200], t[:200], w[:200])), moments((z[200:], t[200:], w[200:]))
    if limited:
        out = predict(reduced_rank(fitted, held_out, 9, (0.0,)), fitted, z)
    else:
        out = regression(fitted, held_out, (0.0,)).predict(z)
    ones, root = torch.cat([z, torch.ones(len(z), 1)], -1).double(), w.sqrt().double()
    root[200:] = 0
    expected = ones @ torch.linalg.lstsq(ones * root, t.double() * root).solution
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-2)


def test_what_is_held_out_decides_the_ridge():
    ridges = (1e-6, 0.1, 10.0)
    few, held_out = samples(0, number=12, p=10, noise=20.0), samples(1, p=10, noise=20.0)
    z, t, w = held_out
    tried = []
    for ridge in ridges:
        line = regression(moments(few), moments(held_out), (ridge,))
        tried.append(float((w * (line.predict(z) - t).square()).sum() / w.sum()))
        assert line.error == pytest.approx(tried[-1], rel=1e-3)
    found = regression(moments(few), moments(held_out), ridges)
    assert found.error == pytest.approx(min(tried), rel=1e-3)
    assert tried.index(min(tried)) == 1, "neither hardly any nor far too much"


def test_with_nothing_held_out_the_strongest_ridge_is_taken():
    few = samples(0, number=12)
    nothing = Moments(torch.zeros(7), torch.zeros(5))
    found = regression(moments(few), nothing, (1.0, 1e-3))
    expected = regression(moments(few), nothing, (1.0,))
    torch.testing.assert_close(found.weight, expected.weight)


def test_inputs_far_from_zero():
    """Squares in fp32 lose what a mean of a hundred deviations leaves of their digits."""
    z, t, w = samples(5, number=30_000, noise=0.5)
    z, z[:, 0] = z / z.std(0) + 100, 100.25
    parts = slice(0, 24_000), slice(24_000, None)

    def fitted(dtype, near=True):
        cut = [[x[part].to(dtype) for x in (z, t, w)] for part in parts]
        origin = tuple(x.to(dtype).mean(0) for x in (z, t)) if near else None
        return regression(*(moments(triple, origin=origin) for triple in cut))

    near, exact = fitted(torch.float32), fitted(torch.float64)
    assert near.error == pytest.approx(exact.error, rel=0.05)
    # Nothing but rounding decides what comes of it otherwise; it is no exception.
    assert fitted(torch.float32, near=False).weight.isfinite().all()
    a, b = (float((line.predict(z) - t).square().mean()) for line in (near, exact))
    assert a == pytest.approx(b, rel=0.05)
