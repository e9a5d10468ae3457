"""Weights that came in int8: their products against the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.cases import needs_cpu
from tests.ops.test_int8_linear import ISAS, check
from variator_kernels.ops import int8_linear, prepack
from variator_kernels.ops.int8_linear import StoredWeight, kernels, op, reference, stored

pytestmark = needs_cpu
in_int8 = pytest.mark.skipif(
    int8_linear.kernel() is None or int8_linear.kernel().levels.weight < 127,
    reason=f"numbers of 8 bits: {int8_linear.describe()}",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
run = torch.ops.variator.int8_linear.default


def case(rows=33, inner=70, outputs=50, scales=None, most=128):
    numbers = torch.randint(-most, most, (outputs, inner), dtype=torch.int8)
    scales = torch.rand(outputs if scales is None else scales) / most / inner**0.5
    return torch.randn(rows, inner), StoredWeight(numbers, scales, True), torch.randn(outputs)


def defined(x, weight, bias):
    each = weight.scales.float().expand(len(weight.numbers))
    quantised = reference.Quantised(weight.numbers, each)
    return reference.int8_linear(x, quantised, bias, levels=int8_linear.kernel().levels)


def exact(x, weight, bias):
    wide = stored.dequantised(weight.numbers, weight.scales, torch.float64)
    return F.linear(x.double(), wide, None if bias is None else bias.double())


@in_int8
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scales", [None, 1])
def test_numbers_multiply_as_they_are(dtype, scales):
    x, weight, bias = case(scales=scales)
    assert weight.numbers.min() == -128
    x = x.to(dtype)
    for given in (bias, None):
        check(op.stored_linear(x, weight, given, True), defined(x, weight, given), dtype)
    assert op.stored_linear(x[:0], weight, bias, True).shape == (0, 50)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_vectors_are_not_rounded_where_weights_alone_are_small(dtype, rows):
    x, weight, bias = case(rows)
    x, bias = x.to(dtype), bias.to(dtype)
    found = op.stored_linear(x.view(1, rows, -1), weight, bias, False)
    truth = exact(x, weight, bias)
    plain = F.linear(x, stored.dequantised(weight.numbers, weight.scales, dtype), bias)
    assert found.dtype == dtype and found.shape == (1, rows, 50)
    allowed = 2 * (plain.double() - truth).abs().max() + 1e-6
    assert (found[0].double() - truth).abs().max() <= allowed


@pytest.mark.skipif("avx2" not in ISAS, reason="the kernel of 7 bits is for AVX2")
def test_without_vnni_numbers_of_8_bits_are_packed_in_the_models_dtype(monkeypatch):
    seven = kernels.Choice(kernels.own("avx2"))
    monkeypatch.setattr(kernels, "choice", lambda *_: seven)
    for most, rounds in ((64, True), (128, False)):
        x, weight, bias = case(most=most)
        assert int8_linear.bears(weight.numbers) == rounds
        found, truth = op.stored_linear(x, weight, bias, True), exact(x, weight, bias)
        error = (found.double() - truth).abs().max()
        assert 1e-3 < error < 0.1 if rounds else error < 1e-5
        if rounds:
            check(found, defined(x, weight, bias), torch.float32)


def test_where_nothing_multiplies_in_int8(monkeypatch):
    monkeypatch.setattr(kernels, "choice", lambda *_: kernels.Choice(None, "a test"))
    x, weight, bias = case()
    found = op.stored_linear(x, weight, bias, True)
    torch.testing.assert_close(found, exact(x, weight, bias).float())


@pytest.mark.parametrize("dynamic", [True, False])
def test_what_is_written_is_noticed(dynamic):
    x, weight, bias = case()
    before = op.stored_linear(x, weight, bias, dynamic)
    for change in (
        lambda: weight.numbers[3].fill_(77),
        lambda: weight.scales.data.mul_(2),
        lambda: bias.numpy().__iadd__(1),
    ):
        change()
        found = op.stored_linear(x, weight, bias, dynamic)
        assert not torch.equal(found, before)
        assert (found.double() - exact(x, weight, bias)).abs().max() < 0.1
        before = found
    assert prepack.cache.nbytes([weight.numbers]) > 0
    prepack.cache.forget([weight.numbers])
    assert prepack.cache.nbytes([weight.numbers]) == 0


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_scale_that_is_not_finite_shows(dynamic):
    x, weight, bias = case()
    weight.scales[7] = torch.nan
    found = op.stored_linear(x, weight, bias, dynamic)
    assert found[:, 7].isnan().all() and found[:, :7].isfinite().all()


def test_is_a_registered_op():
    x, weight, bias = case(5)
    for dynamic in (True, False):
        torch.library.opcheck(run, (x, weight.numbers, bias, weight.scales, dynamic))
    leaf = x.clone().requires_grad_()
    run(leaf, weight.numbers, bias, weight.scales, True).sum().backward()
    wide = stored.dequantised(weight.numbers, weight.scales, torch.float32)
    torch.testing.assert_close(leaf.grad, wide.sum(0).expand(5, -1))


@pytest.mark.parametrize("wrong", ["weight in int8", "an output channel"])
def test_the_op_by_itself_looks_at_what_it_gets(wrong):
    x, weight, bias = case()
    numbers = weight.numbers if "channel" in wrong else weight.numbers.float()
    scales = weight.scales[:3] if "channel" in wrong else weight.scales
    with pytest.raises(ValueError, match=wrong.replace("weight in", "weight with scales is in")):
        run(x, numbers, bias, scales)


def test_parts_are_views():
    x, weight, bias = case()
    part = weight.part(10, 30)
    assert part.numbers.data_ptr() == weight.numbers[10].data_ptr()
    found = op.stored_linear(x, part, bias[10:30], False)
    torch.testing.assert_close(found, exact(x, weight, bias)[:, 10:30].float())
    assert len(case(scales=1)[1].part(10, 30).scales) == 1
