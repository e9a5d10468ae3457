"""Products with norm, activation, factor and residual around them, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import needs_cpu
from variator_kernels import extension
from variator_kernels.ops import dense, int8_linear, prepack, rows_linear
from variator_kernels.ops.arguments import NO_NORM, Norm
from variator_kernels.ops.feed_forward import FeedForward, activate, normalize
from variator_kernels.ops.fused_product import Product, runs

pytestmark = needs_cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["none", "rms", "layer"]
# (rows, in, outs): beside the vectors' widths, one row, odd lengths, more rows than go together.
SHAPES = [(1, 40, (24,)), (7, 33, (20, 9, 64)), (130, 100, (70, 30)), (300, 64, (130,))]


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def norm_of(kind, size, dtype):
    weight = (torch.rand(size) + 0.5).to(dtype)
    bias = draw(size, dtype=dtype) if kind == "layer" else None
    return NO_NORM if kind == "none" else Norm(kind, weight, bias, 1e-6)


def plain(rows, weights, biases, norm, activation, factor, residual):
    """The same by plain PyTorch in the inputs' dtype."""
    h = normalize(rows, norm.name, norm.weight, norm.bias, norm.eps)
    parts = [torch.nn.functional.linear(h, *one) for one in zip(weights, biases, strict=True)]
    y = torch.cat(parts, -1)
    y = y if activation == "none" else activate(y, activation)
    y = y if factor is None else y * factor
    return y if residual is None else y + residual


def wide(value):
    if isinstance(value, tuple) and not isinstance(value, Norm):
        return tuple(map(wide, value))
    if isinstance(value, Norm):
        return Norm(value.name, wide(value.weight), wide(value.bias), value.eps)
    return value.double() if isinstance(value, torch.Tensor) else value


def check(found, given):
    exact, own = plain(*map(wide, given)), plain(*given)
    assert found.dtype == own.dtype and found.shape == own.shape
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6
    assert (found.double() - exact).abs().max() <= allowed


def case(shape, dtype, kind, biased=True):
    rows, inner, outs = shape
    x = draw(rows, inner, dtype=dtype)
    weights = tuple(draw(out, inner, dtype=dtype, scale=inner**-0.5) for out in outs)
    biases = tuple(draw(out, dtype=dtype) if biased and i != 1 else None
                   for i, out in enumerate(outs))  # fmt: skip
    return x, weights, biases, norm_of(kind, inner, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_is_the_product_that_it_stands_for(shape, dtype, kind):
    torch.manual_seed(0)
    for biased in (True, False):
        x, weights, biases, norm = case(shape, dtype, kind, biased)
        total = sum(shape[2])
        factor, residual = (draw(shape[0], total, dtype=dtype) for _ in range(2))
        product = Product(weights, biases)
        assert runs(x, (*weights, *biases))
        for activation in ("none", "relu", "gelu"):
            given = (x, weights, biases, norm, activation, None, None)
            check(product(x, norm, activation), given)
        given = (x, weights, biases, norm, "none", factor, None)
        check(product(x, norm, factor=factor), given)
        given = (x, weights, biases, norm, "none", None, residual)
        check(product(x, norm, residual=residual), given)


ISAS = extension.load().available_isas() if extension.load() else []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [*SHAPES, (97, 79, (100,))], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_kernel_by_itself(isa, shape, threads, monkeypatch):
    """Whatever this machine chooses: few rows share the columns among threads, many the rows."""
    torch.manual_seed(1)
    monkeypatch.setattr(prepack, "instruction_set", lambda: isa)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, kind in zip(DTYPES, NORMS, strict=True):
            x, weights, biases, norm = case(shape, dtype, kind)
            factor, residual = (draw(shape[0], sum(shape[2]), dtype=dtype) for _ in range(2))
            product = rows_linear.stacked(weights, biases, dtype)
            assert product.isa == isa
            for activation in ("none", "gelu_tanh", "silu"):
                given = (x, weights, biases, norm, activation, factor, residual)
                check(product(x, activation, factor, norm, residual), given)
            strided = draw(shape[0], 2 * shape[1], dtype=dtype)[:, : shape[1]]
            given = (strided, weights, biases, NO_NORM, "none", None, None)
            check(product(strided, "none", None, NO_NORM, None), given)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_int8_is_as_near_as_without_what_stands_around(kind, dtype):
    if int8_linear.kernel() is None:
        pytest.skip(f"int8 products: {int8_linear.describe()}")
    torch.manual_seed(2)
    x, weights, biases, norm = case(SHAPES[2], dtype, kind)
    residual = draw(x.shape[0], 100, dtype=dtype)
    exact = plain(*map(wide, (x, weights, biases, norm, "none", None, residual)))
    h = normalize(x, norm.name, norm.weight, norm.bias, norm.eps)
    apart = Product(weights, biases, "int8")(h) + residual
    found = Product(weights, biases, "int8")(x, norm, residual=residual)
    off, allowed = (found.double() - exact).norm(), (apart.double() - exact).norm()
    assert 0 < off <= 1.1 * allowed


def test_what_is_not_finite_shows():
    x, weights, biases, norm = case(SHAPES[1], torch.float32, "layer")
    for precision in (None, "int8"):
        clean = Product(weights, biases, precision)(x, norm)
        y = x.clone()
        y[3, 5] = torch.nan
        found = Product(weights, biases, precision)(y, norm)
        assert found[3].isnan().all()
        assert torch.equal(found[:3], clean[:3]) and torch.equal(found[4:], clean[4:])
    weights[1][2, 2] = torch.inf
    found = Product(weights, biases)(x, NO_NORM)
    torch.testing.assert_close(
        found, plain(x, weights, biases, NO_NORM, "none", None, None), equal_nan=True
    )


def test_where_it_does_not_run():
    x, weights, biases, _ = case(SHAPES[0], torch.float32, "none")
    assert runs(x, (*weights, *biases))
    assert not runs(x.double(), weights) and not runs(x, (weights[0].double(),))
    assert not runs(x[:0], weights)
    assert not runs(x.requires_grad_(), weights)
    with torch.no_grad():
        assert runs(x, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs(x, weights)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_feed_forward_in_pieces(gated, post_norm, dtype, monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(dense, "PIECE", 16)
    w = [draw(*s, dtype=dtype, scale=0.1) for s in ((96, 48), (48, 96), (96, 48))]
    b = [draw(n, dtype=dtype) for n in (96, 48)]
    norm = norm_of("layer", 48, dtype)
    ffn = FeedForward(
        w[0], w[1], w[2] if gated else None, b[0], b[1], activation="silu", norm="layer",
        norm_weight=norm.weight, norm_bias=norm.bias, post_norm=post_norm,
    )  # fmt: skip
    x = draw(3, 15, 48, dtype=dtype)

    def one(x, ffn):
        h = x if ffn.post_norm else normalize(x, *ffn.any_norm)
        inner = activate(torch.nn.functional.linear(h, ffn.w_in, ffn.b_in), ffn.activation)
        inner = inner if ffn.w_gate is None else inner * (h @ ffn.w_gate.t())
        y = x + torch.nn.functional.linear(inner, ffn.w_out, ffn.b_out)
        return normalize(y, *ffn.any_norm) if ffn.post_norm else y

    exact, own = one(x.double(), FeedForward(*map(wide, ffn))), one(x, ffn)
    found = dense.feed_forward(x, ffn)
    assert (found.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 1e-6
    assert dense.feed_forward(x, ffn._replace(dropout_inner=0.1)) is None
