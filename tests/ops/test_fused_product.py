"""Products with norm, activation, factor and residual around them, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops import cases
from tests.ops.cases import ISAS, needs_cpu
from tests.ops.remember import remembered
from variator_kernels import functional
from variator_kernels.ops import dense, int8_linear, prepack, prepacked_linear, rows_linear
from variator_kernels.ops.arguments import NO_NORM, Norm
from variator_kernels.ops.compressed_ffn import cpu as compressed
from variator_kernels.ops.fast_norm import normalize_fast
from variator_kernels.ops.feed_forward import FeedForward, activate, normalize
from variator_kernels.ops.fused_product import Product, runs

pytestmark = needs_cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["none", "rms", "layer"]
# (rows, in, outs): beside the vectors' widths, one row, odd lengths, more rows than go together.
# Of one row so many outputs that the largest error of plain PyTorch is no luck.
SHAPES = [(1, 40, (200,)), (7, 33, (20, 9, 64)), (130, 100, (70, 30)), (300, 64, (130,))]


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


@remembered
def expected(given):
    """In float64, and by plain PyTorch."""
    return plain(*map(wide, given)), plain(*given)


def check(found, given):
    exact, own = expected(given)
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
            product = rows_linear.stacked(weights, biases, dtype, isa)
            assert product.kernel.isa == isa
            for activation in ("none", "gelu_tanh", "silu"):
                given = (x, weights, biases, norm, activation, factor, residual)
                check(product(x, activation, factor, norm, residual), given)
            strided = draw(shape[0], 2 * shape[1], dtype=dtype)[:, : shape[1]]
            given = (strided, weights, biases, NO_NORM, "none", None, None)
            check(product(strided, "none", None, NO_NORM, None), given)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("most", [0, rows_linear.ANY])
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
def test_a_compressed_sublayer_takes_this_kernel_wherever_it_is_the_faster_one(
    most, kind, monkeypatch
):
    """Then of any number of groups at once, an odd one here; elsewhere oneDNN's."""
    torch.manual_seed(2)
    taken = {(prepack.instruction_set(), torch.float32): most}
    monkeypatch.setattr(rows_linear, "MOST", taken)
    packed, steps = [], []
    stacked, in_steps = rows_linear.stacked, compressed._in_steps
    monkeypatch.setattr(rows_linear, "stacked", lambda *a: packed.append(a) or stacked(*a))
    monkeypatch.setattr(compressed, "_in_steps", lambda *a: steps.append(a) or in_steps(*a))
    x = torch.randn(3, 411, 48)
    ffn = cases.feed_forward(48, 300, torch.float32, kind)
    plugin = cases.plugin(48, 4, 16, torch.float32)
    with torch.no_grad():
        y, plain = (
            functional.compressed_ffn(x, plugin, ffn, backend=name) for name in ("cpu", "reference")
        )
    truth = functional.compressed_ffn(
        x.double(), cases.cast(plugin, torch.float64), cases.cast(ffn, torch.float64),
        backend="reference",
    )  # fmt: skip
    cases.assert_close(y, plain, truth)
    products = 2 if ffn.w_gate is None else 3
    assert (len(packed), len(steps)) == ((products, 0) if most else (0, 1))


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


def test_negated_memory_is_read_with_its_sign():
    """By kernels that are called past PyTorch's dispatcher, which would apply it."""
    torch.manual_seed(3)
    x = torch._neg_view(draw(40, 64, dtype=torch.float32))
    weight, norm = torch.randn(64, 64), norm_of("rms", 64, torch.float32)
    assert not runs(x, (weight,)) and runs(x.resolve_neg(), (weight,))
    with torch.no_grad():
        for found, made in (
            (normalize_fast(x, norm), normalize_fast(x.resolve_neg(), norm)),
            (prepacked_linear.packed(x, weight), torch.nn.functional.linear(x, weight)),
        ):
            torch.testing.assert_close(found, made, atol=1e-4, rtol=1e-4)


def test_one_packed_form_serves_all_numbers_of_rows(monkeypatch):
    """Of few rows and of many, and together with what training packs."""
    isa = prepack.instruction_set()
    for most, kinds in ((64, {"linear"}), (rows_linear.ANY, {"rows"})):
        monkeypatch.setattr(rows_linear, "MOST", {(isa, torch.float32): most})
        model, made = torch.nn.Linear(512, 512, bias=False).requires_grad_(False), []
        get = prepack.cache.get

        def spy(sources, form, pack, get=get, made=made):
            made.append(form[0])
            return get(sources, form, pack)

        with monkeypatch.context() as patched:
            patched.setattr(prepack.cache, "get", spy)
            for rows in (600, 32):
                prepacked_linear.packed(draw(rows, 512, dtype=torch.float32), model.weight)
        assert set(made) == kinds
        with prepacked_linear.FrozenProducts(model):
            assert prepacked_linear.shares()
        assert not prepacked_linear.shares()
