"""Products with frozen weights: as F.linear in both directions, and only where they may be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import assert_close, needs_cpu
from tests.sites import tiny
from variator_kernels.ops import prepack, prepacked_linear, rows_linear
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.find import find

pytestmark = needs_cpu
IN, OUT = 136, 144


@pytest.fixture
def packed(monkeypatch):
    """How often each direction ran on packed weights."""
    calls = {"linear": 0, "transposed": 0}

    def counted(name, plain):
        def call(*args):
            found = plain(*args)
            calls[name] += found is not None
            return found

        return call

    for name in calls:
        monkeypatch.setattr(prepack, name, counted(name, getattr(prepack, name)))
    return calls


def layer(bias=True, dtype=torch.float32):
    return nn.Linear(IN, OUT, bias).to(dtype).requires_grad_(False)


def run(linear, x, dy):
    """The output and the input's gradient."""
    x = x.clone().requires_grad_()
    y = linear(x)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y, dx


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_is_linear_in_both_directions(packed, dtype, bias, shape):
    autocast = dtype == "autocast"
    linear = layer(bias, torch.float32 if autocast else dtype)
    x, dy = torch.randn(*shape, IN), torch.randn(*shape, OUT)
    wide = layer(bias).double()
    wide.load_state_dict({name: t.double() for name, t in linear.state_dict().items()})
    x, dy = x.to(linear.weight.dtype), dy.to(linear.weight.dtype)
    exact = run(wide, x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = run(linear, x, dy)
        with prepacked_linear.FrozenProducts(linear):
            ours = run(linear, x, dy)
    assert packed == {"linear": 1, "transposed": 1}
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, c)


def test_a_layer_in_two_precisions():
    linear, x, dy = layer(), torch.randn(5, IN), torch.randn(5, OUT)
    with prepacked_linear.FrozenProducts(linear):
        for autocast in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, dx = run(linear, x, dy)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert dx.dtype == torch.float32


def test_weights_with_gradients_are_left_alone(packed):
    """In a pass that computes them."""
    linear, bias_alone, x = layer().requires_grad_(True), layer(), torch.randn(3, IN)
    bias_alone.bias.requires_grad_(True)
    with prepacked_linear.FrozenProducts(nn.ModuleList([linear, bias_alone])):
        linear(x).sum().backward()
        bias_alone(x).sum().backward()
        assert linear.weight.grad is not None and bias_alone.bias.grad is not None
        assert packed["linear"] == 0
        with torch.no_grad():
            linear(x)
    assert packed["linear"] == 1


def test_what_is_no_parameter_is_left_alone(packed):
    """A weight computed for one call (a parametrisation's) would be packed for that call alone."""
    small, empty, wide = nn.Linear(8, 8).requires_grad_(False), layer(), layer().double()
    with prepacked_linear.FrozenProducts(nn.ModuleList([small, empty, wide])):
        prepacked_linear.linear(torch.randn(3, IN), torch.randn(OUT, IN))
        small(torch.randn(3, 8))
        empty(torch.randn(0, IN))
        wide(torch.randn(3, IN).double())
    assert packed["linear"] == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda linear: linear(torch.randn(3, IN).double()),
        lambda linear: linear(torch.randn(3, IN - 1)),
        lambda linear: prepacked_linear.linear(torch.randn(3, IN), linear.weight, linear.bias[1:]),
        lambda linear: linear(torch.ones(3, IN, dtype=torch.long)),
    ],
    ids=["dtype", "width", "bias", "integers"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_errors_are_pytorchs(call, autocast):
    linear = layer()

    def attempt():
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call(linear).dtype
        except RuntimeError as error:
            return str(error)

    plain = attempt()
    with prepacked_linear.FrozenProducts(linear):
        assert attempt() == plain


def test_shapes_that_are_no_matrix_product():
    vector = nn.Parameter(torch.randn(prepacked_linear.LEAST), requires_grad=False)
    x = torch.randn(3, prepacked_linear.LEAST)
    linear = layer()
    one = torch.randn(1)
    with prepacked_linear.FrozenProducts(linear):
        torch.testing.assert_close(prepacked_linear.linear(x, vector), x @ vector)
        y = prepacked_linear.linear(torch.ones(2, IN), linear.weight, one)
    torch.testing.assert_close(y, torch.ones(2, IN) @ linear.weight.T + one)


def test_results_may_be_changed_in_place():
    """Hooks do it."""
    linear, x, dy = layer(), torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    with prepacked_linear.FrozenProducts(linear):
        y, dx = run(lambda x: linear(x).mul_(2).relu_(), x, dy)
    expected = run(lambda x: (linear(x) * 2).relu(), x, dy)
    torch.testing.assert_close((y, dx), expected)


def test_second_derivatives():
    linear, x = layer(), torch.randn(3, IN, requires_grad=True)

    def second():
        (g,) = torch.autograd.grad(linear(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with prepacked_linear.FrozenProducts(linear):
        ours = second()
    torch.testing.assert_close(ours, second())


@pytest.fixture
def fp32_products(monkeypatch):
    """A processor without products in 16 bits."""
    monkeypatch.setattr(prepack, "EMULATED", frozenset({torch.bfloat16, torch.float16}))
    monkeypatch.setattr(prepack, "NARROW_ROWS", 0)


@pytest.fixture
def multiplied(monkeypatch):
    """The dtypes in which PyTorch multiplied."""
    plain, dtypes = nn.functional.linear, []
    monkeypatch.setattr(
        prepacked_linear.F,
        "linear",
        lambda x, weight, bias=None: dtypes.append(x.dtype) or plain(x, weight, bias),
    )
    return dtypes


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_without_16_bit_products(fp32_products, packed, multiplied, dtype, bias, trains):
    """Outside FrozenProducts too: fp32 products, the dtypes of F.linear, frozen weights packed."""
    autocast = dtype == "autocast"
    linear = layer(bias, torch.float32 if autocast else dtype).requires_grad_(trains)
    wide = layer(bias).double().requires_grad_(trains)
    wide.load_state_dict({name: t.double() for name, t in linear.state_dict().items()})
    stored = linear.weight.dtype
    x, dy = torch.randn(2, 5, IN).to(stored), torch.randn(2, 5, OUT).to(stored)

    def run(module, product, x, dy):
        x = x.clone().requires_grad_()
        y = product(x, module.weight, module.bias)
        return y, *torch.autograd.grad(
            y, [x, *(module.parameters() if trains else ())], dy.to(y.dtype)
        )

    exact = run(wide, torch.ops.aten.linear, x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = run(linear, torch.ops.aten.linear, x, dy)
        ours = run(linear, prepacked_linear.linear, x, dy)
    assert packed == ({"linear": 0, "transposed": 0} if trains else {"linear": 1, "transposed": 1})
    assert multiplied == ([torch.float32] if trains else [])
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, c)


def test_converted_weights_are_never_old(fp32_products):
    """Not even when they are written through ``.data`` within a step."""
    linear, x = layer(dtype=torch.bfloat16).requires_grad_(True), torch.randn(3, IN).bfloat16()
    before = prepacked_linear.linear(x, linear.weight, linear.bias)
    linear.weight.data.mul_(2)
    linear.bias.data.mul_(2)
    torch.testing.assert_close(prepacked_linear.linear(x, linear.weight, linear.bias), 2 * before)
    linear.requires_grad_(False)
    frozen = prepacked_linear.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(frozen, 2 * before)
    linear.weight.data.mul_(2)
    linear.bias.data.mul_(2)
    torch.testing.assert_close(prepacked_linear.linear(x, linear.weight, linear.bias), 4 * before)


def test_compiled_without_16_bit_products(fp32_products):
    linear, x = layer(dtype=torch.bfloat16), torch.randn(3, IN).bfloat16()
    compiled = torch.compile(prepacked_linear.linear, backend="eager", fullgraph=True)
    out = compiled(x, linear.weight, linear.bias)
    assert torch.equal(out, linear.float()(x.float()).bfloat16())


@pytest.mark.parametrize(
    ("limit", "avx512", "bf16_instructions", "slow", "tiles", "expected"),
    [
        ("", True, True, False, False, True),
        ("", True, False, False, False, False),
        ("avx512_core", True, True, False, False, False),
        ("AVX512_CORE_VNNI", True, True, False, False, False),
        ("AVX512_CORE_BF16", True, True, False, False, True),
        ("", False, False, False, False, True),  # bf16 conversions beside AVX2
        ("", True, True, True, False, False),
        ("", True, True, True, True, True),
        ("AVX512_CORE_BF16", True, True, True, True, False),
    ],
)
def test_where_bf16_is_emulated(
    monkeypatch, limit, avx512, bf16_instructions, slow, tiles, expected
):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(prepack, "_slow_pairs", lambda: slow)
    assert (torch.bfloat16 not in prepack._emulated()) == expected


@pytest.mark.parametrize(("rows", "narrow"), [(1, True), (8, True), (9, False)])
@torch.no_grad()
def test_few_vectors_keep_bf16_where_more_take_fp32(monkeypatch, fp32_products, rows, narrow):
    if narrow and not prepack._has_bf16():
        pytest.skip("oneDNN has no products of bf16 here")
    monkeypatch.setattr(prepack, "NARROW_ROWS", 8)
    monkeypatch.setattr(rows_linear, "MOST", {})
    linear, x = layer(dtype=torch.bfloat16), torch.randn(rows, IN).bfloat16()
    plain, dtypes = prepack.PackedLinear.__call__, []

    def call(self, x):
        dtypes.append((x.dtype, self.weight.dtype))
        return plain(self, x)

    monkeypatch.setattr(prepack.PackedLinear, "__call__", call)
    found = prepacked_linear.packed(x, linear.weight, linear.bias)
    assert dtypes == [(torch.bfloat16 if narrow else torch.float32,) * 2]
    truth = nn.functional.linear(*(t.double() for t in (x, linear.weight, linear.bias)))
    assert_close(found, linear(x), truth, "product")


@pytest.mark.parametrize(("rows", "converted"), [(127, False), (128, True)])
def test_weights_are_converted_in_each_call_where_it_pays(
    monkeypatch, fp32_products, multiplied, rows, converted
):
    monkeypatch.setattr(prepack, "NARROW_ROWS", 8)
    linear, x = layer(dtype=torch.bfloat16), torch.randn(rows, IN).bfloat16()
    found = prepacked_linear.unpacked(x, linear.weight, linear.bias)
    assert multiplied == [torch.float32 if converted else torch.bfloat16]
    assert found.dtype == torch.bfloat16
    compiled = torch.compile(prepacked_linear.unpacked, backend="eager", fullgraph=True)
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(compiled(x, linear.weight, linear.bias), plain)


def test_ignored_weights_are_left_alone(packed):
    linear = layer()
    with prepacked_linear.FrozenProducts(linear, ignored=[linear.weight]):
        linear(torch.randn(3, IN))
    assert packed["linear"] == 0


def test_a_changed_weight_is_packed_again():
    linear, x, dy = layer(), torch.randn(3, IN), torch.randn(3, OUT)
    with prepacked_linear.FrozenProducts(linear):
        before = run(linear, x, dy)
        linear.weight.mul_(2)
        linear.bias.mul_(2)
        for old, new in zip(before, run(linear, x, dy), strict=True):
            torch.testing.assert_close(new, 2 * old)
        y = linear(x.requires_grad_())
        linear.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_nan_shows():
    linear, x = layer(), torch.randn(3, IN)
    linear.weight[0, 0] = float("nan")
    with prepacked_linear.FrozenProducts(linear):
        y, dx = run(linear, x, torch.ones(3, OUT))
        assert y[:, 0].isnan().all() and dx[:, 0].isnan().all()
    linear = layer()
    with prepacked_linear.FrozenProducts(linear):
        x[1, 1] = float("nan")
        y, _ = run(linear, x, torch.ones(3, OUT))
        assert y[1].isnan().all() and y[0].isfinite().all()


def test_layers_are_as_before_afterwards(packed):
    linear, other, x = layer(), layer(), torch.randn(3, IN)
    model = nn.ModuleList([linear, other])
    products = prepacked_linear.FrozenProducts(model)
    other.forward = theirs = lambda x: x  # another tool's, later than the products were made
    before = [dict(vars(module)) for module in model.modules()]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), products:
            assert other(x) is x
            linear(x)
            raise ZeroDivisionError
        assert packed["linear"] == 1
        packed["linear"] = 0
        linear(x)
        prepacked_linear.linear(x, linear.weight)
        assert packed["linear"] == 0 and other.forward is theirs
    assert [dict(vars(module)) for module in model.modules()] == before


def test_nested_and_disturbed(packed):
    """By another block over the same model, by itself, and by what takes a forward away."""
    linear, x = layer(), torch.randn(3, IN)
    one, two = prepacked_linear.FrozenProducts(linear), prepacked_linear.FrozenProducts(linear)
    for outer, inner in ((one, two), (one, one)):
        with outer:
            with inner:
                linear(x)
            linear(x)
        assert packed["linear"] == 2 and "forward" not in vars(linear)
        packed["linear"] = 0
    with one:
        del linear.forward
    with one, two:
        linear.forward = theirs = lambda x: x
    assert linear.forward is theirs
    del linear.forward
    linear(x)
    prepacked_linear.linear(x, linear.weight)
    assert packed["linear"] == 0


def test_a_compiled_module_is_compiled_once():
    linear, x = layer(), torch.randn(3, IN)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    products = prepacked_linear.FrozenProducts(linear)
    expected = linear(x)
    for _ in range(12):  # more than the compiler's limit of 8
        with products:
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), expected)


def test_another_thread_is_left_alone(packed):
    linear, x = layer(), torch.randn(3, IN)
    with prepacked_linear.FrozenProducts(linear), ThreadPoolExecutor(1) as pool:
        pool.submit(linear, x).result()
        assert packed["linear"] == 0
        linear(x)
    assert packed["linear"] == 1


@pytest.mark.parametrize(("family", "act"), tiny.VARIANTS)
def test_a_sublayer_is_described_as_before(family, act):
    model = vk.patch(tiny.model(family, act), ratio=4)
    layers = find(model).layers
    assert not any(describe(layer).module for layer in layers)
    with prepacked_linear.FrozenProducts(model):
        assert all("forward" in vars(part) for part in model.modules() if type(part) is nn.Linear)
        assert not any(describe(layer).module for layer in layers)
