"""A row's output depends on that row alone; what an untrained plugin computes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.ops.cases import feed_forward, needs_cpu, plugin
from variator_kernels import functional as vf
from variator_kernels.ops.feed_forward import PluginWeights, normalize, products

D = 12
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def layer(x, p, ffn, backend, mask=None):
    with torch.no_grad():
        return vf.compressed_ffn(x, p, ffn, mask=mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    k=st.sampled_from([2, 3, 4, 8]),
    left=st.booleans(),
    extra=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_a_row_depends_on_itself_alone(backend, lengths, k, left, extra, seed):
    torch.manual_seed(seed)
    p, ffn = plugin(D, k, 5, torch.double), feed_forward(D, 16, torch.double, "t5")
    rows = [torch.randn(length, D, dtype=torch.double) for length in lengths]
    n = max(lengths) + extra
    x = torch.full((len(rows), n, D), float("nan"), dtype=torch.double)
    mask = torch.zeros(len(rows), n, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(n - len(row), n) if left else slice(0, len(row))
        x[i, place], mask[i, place] = row, True
    y = layer(x, p, ffn, backend, mask)
    for i, row in enumerate(rows):
        alone = layer(row[None], p, ffn, backend)[0]
        torch.testing.assert_close(y[i, mask[i]], alone, rtol=1e-9, atol=1e-9)
    assert torch.isnan(y[~mask]).all()  # padding passes through, whatever it holds


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    k=st.sampled_from([2, 3, 4, 8, 32]),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    left=st.booleans(),
    extra=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_a_kept_token_is_dense_and_no_other_row_matters(
    backend, lengths, k, ends, share, left, extra, seed
):
    """Whatever stands in other rows and however much padding there is, on either side."""
    torch.manual_seed(seed)
    p, ffn = plugin(D, k, 5, torch.double), feed_forward(D, 16, torch.double, "t5")
    n = max(lengths) + extra
    x = torch.full((len(lengths), n, D), float("nan"), dtype=torch.double)
    mask, keep = torch.zeros(2, len(lengths), n, dtype=torch.bool)
    rows = [torch.randn(length, D, dtype=torch.double) for length in lengths]
    kept = [torch.rand(length) < share for length in lengths]
    for i, row in enumerate(rows):
        place = slice(n - len(row), n) if left else slice(0, len(row))
        x[i, place], mask[i, place], keep[i, place] = row, True, kept[i]
    first, last = ends
    options = {"keep_first": first, "keep_last": last, "backend": backend}
    with torch.no_grad():
        y = vf.compressed_ffn(x, p, ffn, mask=mask, keep=keep | ~mask, **options)
    assert torch.isnan(y[~mask]).all()
    for i, row in enumerate(rows):
        with torch.no_grad():
            alone = vf.compressed_ffn(row[None], p, ffn, keep=kept[i][None], **options)[0]
        torch.testing.assert_close(y[i, mask[i]], alone, rtol=1e-9, atol=1e-9)
        h = normalize(row, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
        whole = kept[i].clone()
        whole[:first] = whole[max(len(row) - last, 0) :] = True
        dense = (row + products(h, ffn))[whole]
        torch.testing.assert_close(alone[whole], dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_untrained_is_mean_pooling_and_copy(backend):
    d, k = D, 4
    p = plugin(d, k, 5, torch.double)
    zero = {f: torch.zeros_like(getattr(p, f)) for f in ("merge_weight", "merge_bias", "w2", "b2")}
    p: PluginWeights = p._replace(**zero)
    x = torch.randn(2, 10, d, dtype=torch.double)
    g = vf.group_merge(x, p.merge_weight, p.merge_bias, backend=backend)
    torch.testing.assert_close(g[:, 0], x[:, :4].mean(1))
    torch.testing.assert_close(g[:, 2], x[:, 8:].mean(1))
    o = vf.adapter_decompress(g, x, *p[2:6], ratio=k, backend=backend)
    torch.testing.assert_close(o[:, 5], g[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hole_wider_than_a_group_leaves_a_group_empty(backend):
    p, ffn = plugin(D, 4, 5, torch.double), feed_forward(D, 16, torch.double, "t5")
    x = torch.randn(1, 16, D, dtype=torch.double)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, 4:9] = False
    y = layer(x, p, ffn, backend, mask)
    assert torch.equal(y[~mask], x[~mask])
    assert (vf.group_merge(x, *p[:2], mask=mask, backend=backend)[0, 1] == 0).all()
    # The third group lost its first token and is otherwise as with zeros there.
    assert not torch.equal(y[0, 9:12], layer(x, p, ffn, backend)[0, 9:12])
