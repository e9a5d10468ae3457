"""int8_linear: the kernel of this machine against its definition in float64."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from tests.ops.cases import INT8_ISAS, ISAS, needs_cpu
from tests.ops.remember import remembered
from variator_kernels import extension
from variator_kernels.ops import int8_linear, prepack
from variator_kernels.ops.feed_forward import FFN_ACTIVATIONS, activate
from variator_kernels.ops.int8_linear import kernels, module, op, own_precision, reference
from variator_kernels.ops.int8_linear.module import Linear
from variator_kernels.ops.int8_linear.packed import packed

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(
        int8_linear.kernel() is None, reason=f"int8 products: {int8_linear.describe()}"
    ),
]
# (rows, in, out): one number, no row, sizes beside the vectors' widths, rows of several blocks.
SHAPES = [
    (1, 1, 1),
    (0, 8, 4),
    (5, 33, 7),
    (40, 50, 70),
    (70, 193, 50),
    (300, 64, 96),
    (2060, 9, 5),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = ["none", *FFN_ACTIVATIONS]


def levels():
    return int8_linear.kernel().levels


defined = remembered(reference.int8_linear)


def truth(x, weight, bias=None, **options):
    return defined(x, weight, bias, levels=levels(), **options)


def check(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    rounding = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    allowed = 2 * rounding * expected.abs().max().item() + 1e-6 if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


def case(rows, inner, outputs, dtype=torch.float32):
    x = torch.randn(rows, inner).to(dtype)
    weight = (torch.randn(outputs, inner) * inner**-0.5).to(dtype)
    return x, weight, torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_what_it_is_defined_as(shape, dtype):
    x, weight, bias = case(*shape, dtype)
    for given in (bias, None):
        product = packed(weight, given)
        check(product(x), truth(x, weight, given), dtype)
        other = torch.randn(shape[0], shape[2]).to(dtype)
        check(product.times(x, other), truth(x, weight, given, other=other), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_activations(activation, dtype):
    x, weight, bias = case(70, 50, 40, dtype)
    found = packed(weight, bias)(x * 3, activation)
    check(found, truth(x * 3, weight, bias, activation=activation), dtype)


@pytest.mark.parametrize("inner", [1, 2, 63, 64, 768, 3072])
def test_the_largest_numbers_do_not_saturate(inner):
    """All of one sign and of the other: the sums are the largest that there are."""
    sign = torch.tensor([1.0, -1.0])[:, None]
    x, weight = sign.expand(2, inner).repeat(20, 1), sign.expand(2, inner).repeat(8, 1)
    check(packed(weight, None)(x), truth(x, weight), torch.float32)
    assert packed(weight, None)(x)[0, 0] == pytest.approx(inner, rel=1e-6)


def test_without_vnni_weights_of_8_bits_saturate():
    """Why they have 7 there; and the look at the largest numbers sees what is wrong."""
    if kernels._has_vnni():
        pytest.skip("this processor has VNNI")
    for kernel in (kernels.own("avx2"), kernels.onednn()):
        assert not kernels.is_exact(kernel._replace(levels=reference.Levels(255, 127)))
        assert kernels.is_exact(kernel._replace(levels=reference.Levels(255, 64)))


@pytest.mark.parametrize("outlier", [1e3, 1e30])
def test_rows_have_scales_of_their_own(outlier):
    x, weight, bias = case(33, 50, 20)
    calm = packed(weight, bias)(x)
    x[7, 3] = outlier
    found = packed(weight, bias)(x)
    others = torch.arange(33) != 7
    assert torch.equal(found[others], calm[others])
    check(found[7:8], truth(x[7:8], weight, bias), torch.float32)


def test_a_row_depends_on_itself_alone():
    x, weight, bias = case(300, 50, 20)
    product = packed(weight, bias)
    for rows in (1, 3, 17, 41, 299):
        assert torch.equal(product(x[:rows]), product(x)[:rows])


def test_zeros():
    x, weight, bias = case(9, 40, 20)
    x[2], weight[3] = 0, 0
    x[4] = 1e-35  # too small to be divided by
    found = packed(weight, bias)(x)
    check(found, truth(x, weight, bias), torch.float32)
    assert torch.equal(found[2], bias) and torch.equal(found[4], bias)
    assert (found[:, 3] == bias[3]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_shows_in_its_row(value, activation):
    x, weight, bias = case(9, 40, 20)
    clean = packed(weight, bias)(x, activation)
    x[5, 11] = value
    found = packed(weight, bias)(x, activation)
    assert found[5].isnan().all()
    others = torch.arange(9) != 5
    assert torch.equal(found[others], clean[others])


def test_a_changed_weight_is_noticed():
    x, weight, bias = case(9, 200, 100)
    op.linear(x, weight, bias)
    for change in (lambda: weight.data.mul_(2), lambda: bias.data.add_(1)):
        change()
        check(op.linear(x, weight, bias), truth(x, weight, bias), torch.float32)
    weight.numpy()[3, 5] = 9
    check(op.linear(x, weight, bias), truth(x, weight, bias), torch.float32)


def test_weights_are_packed_once():
    _, weight, bias = case(9, 192, 128)
    first = packed(weight, bias)
    assert packed(weight, bias) is first
    size = prepack.cache.nbytes([weight])
    assert weight.numel() <= size < 1.2 * weight.numel()
    prepack.cache.forget([weight])
    assert prepack.cache.nbytes([weight]) == 0


def test_a_weight_that_is_not_finite_multiplies_as_it_is():
    x, weight, bias = case(9, 40, 20)
    weight[4, 2] = torch.nan
    found = op.linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), equal_nan=True)
    assert found[:, 4].isnan().all()


def test_shapes_and_errors_are_those_of_linear():
    x, weight, bias = case(12, 40, 20)
    for shape in [(12, 40), (3, 4, 40), (40,), (0, 40), (2, 0, 40)]:
        given = x.reshape(shape) if shape[0] in (12, 3) else torch.randn(shape)
        assert op.linear(given, weight, bias).shape == F.linear(given, weight, bias).shape
    for wrong in ((x[:, 1:], weight, bias), (x.double(), weight, bias), (x, weight, bias[1:])):
        with pytest.raises(RuntimeError):
            op.linear(*wrong)
    strided = torch.randn(12, 80)[:, ::2]
    check(op.linear(strided, weight, bias), truth(strided, weight, bias), torch.float32)


def test_autocast():
    x, weight, bias = case(12, 40, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = op.linear(x, weight, bias)
    check(found, truth(x.bfloat16(), weight, bias), torch.bfloat16)


def test_is_a_registered_op():
    x, weight, bias = case(12, 40, 20)
    run = torch.ops.variator.int8_linear.default
    for given in ((x, weight, bias), (x.view(3, 4, 40), weight, None)):
        torch.library.opcheck(run, given)
    compiled = torch.compile(op.linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), op.linear(x, weight, bias))


def test_gradients_are_those_of_the_product_that_is_not_rounded():
    leaves = [t.requires_grad_() for t in case(12, 40, 20)]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    dy = torch.randn(12, 20)
    op.linear(*leaves).backward(dy)
    F.linear(*twins).backward(dy)
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_the_op_by_itself_looks_at_shapes():
    x, weight, bias = case(12, 40, 20)
    run = torch.ops.variator.int8_linear.default
    for wrong in ((x, weight, bias[:1]), (x[:, 1:], weight, None), (x, weight[0], None)):
        with pytest.raises((RuntimeError, ValueError)):
            run(*wrong)


def test_sums_that_would_not_fit_are_not_made():
    inner = 2**31 // (levels().rows * levels().weight) + 1
    x, weight = torch.ones(1, inner), torch.ones(2, inner)
    assert packed(weight, None) is None
    torch.testing.assert_close(op.linear(x, weight, None), torch.full((1, 2), float(inner)))


def test_modes_see_every_product():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from variator_kernels.ops import prepacked_linear

    for kind in (Linear, prepacked_linear.Linear):
        layer = kind(256, 256).eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.randn(64, 256))
        assert counter.get_total_flops() == 2 * 64 * 256 * 256
        with torch.no_grad(), FakeTensorMode():
            fake = kind(256, 256).eval().requires_grad_(False)
            assert fake(torch.randn(64, 256)).shape == (64, 256)


def test_the_kernel_refuses_fp64():
    product = kernels.own(ISAS[0]).round_and_pack(torch.randn(4, 8), None)
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16.*float64"):
        product.multiply(torch.randn(3, 8, dtype=torch.float64), "none")


@pytest.mark.usefixtures("threads")
def test_threads_at_once():
    x, weight, bias = case(40, 100, 60)
    expected, found = packed(weight, bias)(x), []

    def run():
        found.extend(torch.equal(op.linear(x, weight, bias), expected) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(found)


def test_where_it_runs():
    with torch.no_grad():
        assert int8_linear.here("int8", training=False) == "int8"
        assert int8_linear.here("int8", training=True) is None
        assert int8_linear.here(None, training=False) is None
        with own_precision():
            assert int8_linear.here("int8", training=False) is None
        assert int8_linear.here("int8", training=False) == "int8"
    with torch.inference_mode():
        assert int8_linear.here("int8", training=False) == "int8"
    assert int8_linear.here("int8", training=False) is None  # gradients


@pytest.fixture
def fresh_choice():
    kernels._choice.cache_clear()
    yield
    kernels._choice.cache_clear()


def test_the_kernel_follows_the_processor(monkeypatch, fresh_choice):
    monkeypatch.setattr(kernels, "is_exact", lambda _: True)
    monkeypatch.setattr(prepack, "instruction_set", lambda: "avx2")
    for vnni, limit, name in (
        (True, "", "oneDNN"),
        (False, "", "own avx2"),
        (True, "avx2", "own avx2"),
    ):
        kernels._choice.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert int8_linear.kernel().name == name
    monkeypatch.setattr(prepack, "instruction_set", lambda: "portable")
    assert int8_linear.kernel() is None and "fp32 are faster" in int8_linear.describe()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_the_kernel_may_be_asked_for_inside_a_trace(fresh_choice, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1)
    layer, x = Linear(64, 32).eval(), torch.randn(5, 64)
    expected = layer(x)
    ways = [
        lambda: torch.export.export(layer, (x,), strict=False).module(),
        lambda: torch.jit.trace(layer, x),
        lambda: torch.compile(layer, fullgraph=True, backend="eager"),
    ]
    for make in ways:
        kernels._choice.cache_clear()
        assert torch.equal(make()(x), expected)
    with torch.enable_grad():
        assert not torch.equal(layer(x), expected)


def test_says_why_nothing_runs(monkeypatch, fresh_choice):
    monkeypatch.setattr(kernels, "is_exact", lambda _: False)
    assert "is not exact here" in int8_linear.describe() and int8_linear.kernel() is None
    with torch.no_grad():
        assert int8_linear.here("int8", training=False) is None
    monkeypatch.setattr(extension, "load", lambda *_: None)
    assert "the CPU kernels are missing" in int8_linear.describe()


@pytest.mark.parametrize("name", ["oneDNN", *INT8_ISAS])
@pytest.mark.parametrize("shape", [*SHAPES, (97, 260, 100), (24, 3072, 33)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_kernel_by_itself(name, shape, threads):
    """Whatever this machine chooses: few rows share the columns among threads, many the rows."""
    kernel = kernels.onednn() if name == "oneDNN" else kernels.own(name)
    if name == "oneDNN" and not kernels._has_vnni():
        kernel = kernel._replace(levels=reference.Levels(255, 64))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, activation in zip((*DTYPES[:3], *DTYPES[:2]), ACTIVATIONS, strict=True):
            x, weight, bias = case(*shape, dtype)
            other = torch.randn(shape[0], shape[2]).to(dtype)
            options = {"activation": activation, "other": other}
            expected = defined(x, weight, bias, levels=kernel.levels, **options)
            product = kernel.round_and_pack(weight, bias)
            check(product.multiply(x, **options), expected, dtype)
            wide = torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, : shape[1]]
            expected = defined(wide, weight, bias, levels=kernel.levels)
            check(product.multiply(wide, "none"), expected, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", INT8_ISAS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_the_kernel(isa, activation):
    """Alone, far out and at 0."""
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([0.0, -0.0, 1e-20, -90, 1e4])])
    weight, kernel = torch.ones(1, 1), kernels.own(isa)
    # Rows of one number are exact but for the scale's rounding.
    found = kernel.round_and_pack(weight, None).multiply(x[:, None], activation)[:, 0]
    given = reference.int8_linear(x[:, None], weight, levels=kernel.levels)[:, 0]
    exact = activate(given, activation)
    plain = (activate(given.float(), activation).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * plain + 1e-6


@pytest.mark.parametrize("isa", INT8_ISAS)
@pytest.mark.parametrize("rows", [97, 130, 200])
def test_threads_change_nothing(isa, rows):
    """Many threads share columns where there are few blocks of rows."""
    x, weight, bias = case(rows, 200, 100)
    product, before = kernels.own(isa).round_and_pack(weight, bias), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(product.multiply(x, "gelu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
