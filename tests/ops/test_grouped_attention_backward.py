"""The backward pass of grouped_attention's CPU kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.attention_cases import (
    KINDS,
    SHAPES,
    check_gradients,
    gradients,
    options,
    qkv,
    t5_table,
)
from tests.ops.cases import DTYPES, ISAS, assert_close, kernels, needs_cpu  # noqa: F401
from variator_kernels import extension
from variator_kernels import functional as vf
from variator_kernels.ops.grouped_attention import cpu, op
from variator_kernels.ops.self_attention import Book, Scheme, Step

pytestmark = needs_cpu
every_isa = pytest.mark.parametrize("kernels", ISAS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def check(inputs, given, what):
    check_gradients(inputs, "cpu", given, torch.randn(inputs[0].shape), what)


def decoder(n, ratio, window, rows=2, kept=3):
    """Bias and bounds of the keys of a causal prompt, and their number."""
    book = Book.empty(rows, torch.device("cpu"))
    step = Step(Scheme(ratio, window, kept), book, None, torch.arange(n)[None])
    return {"bias": step.bias, "first": step.first, "last": step.last}, n + step.groups


@every_isa
@every_dtype
@every_kind
def test_gradients(kernels, dtype, kind):  # noqa: F811
    for shape in SHAPES:
        check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@every_isa
@two_dtypes
@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 530])
def test_numbers_of_keys_beside_those_of_tiles(kernels, dtype, count):  # noqa: F811
    shape = (2, 21, count, 4, 2, 24)
    for kind in ("plain", "t5 attention_kv", "bias"):
        check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@every_isa
@two_dtypes
@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 16, 17, 63, 65, 80, 200])
def test_head_sizes_beside_those_of_vectors(kernels, dtype, d):  # noqa: F811
    for shape in ((2, 1, 37, 2, 1, d), (1, 19, 70, 2, 2, d)):
        given = options("t5 attention", shape) | {"scale": d**-0.5}
        check(qkv(shape, dtype), given, str(shape))


@every_isa
@two_dtypes
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 47, 48, 49, 193, 400, 801])
def test_numbers_of_queries_beside_those_of_blocks(kernels, dtype, n):  # noqa: F811
    """One chunk of queries, several of equal size, a ragged last one."""
    for heads, kv_heads in ((2, 2), (9, 3), (60, 1)):
        shape = (1, n, 70, heads, kv_heads, 8)
        for kind in ("plain", "causal"):
            check(qkv(shape, dtype), options(kind, shape), f"{kind} {shape}")


@every_isa
@two_dtypes
def test_bounds_within_and_between_tiles(kernels, dtype):  # noqa: F811
    shape = rows, n, count, *_ = (2, 300, 300, 2, 1, 24)
    inputs, steps = qkv(shape, dtype), torch.arange(count).expand(rows, count)
    for width in (1, 5, 40, 128, 200):
        check(inputs, {"first": steps, "last": steps + width}, f"a band of {width}")
    edges = torch.randint(-5, n + 5, (2, rows, count)).sort(0).values
    check(inputs, {"first": edges[0], "last": edges[1]}, "any bounds")
    both = options("t5 attention", shape) | {"first": steps}
    check(inputs, both, "terms, biases and bounds")


@every_isa
@two_dtypes
@pytest.mark.parametrize(("n", "window"), [(700, 64), (391, 1), (300, 150)])
def test_a_decoder(kernels, dtype, n, window):  # noqa: F811
    """Few queries of a row see any one key, and most tiles nobody of a block."""
    given, count = decoder(n, 4, window)
    check(qkv((2, n, count, 6, 2, 24), dtype), given, f"n={n}, window={window}")


@every_isa
@every_dtype
def test_what_nobody_sees_brings_no_gradient(kernels, dtype):  # noqa: F811
    """A query without a key gets 0, whatever its gradient; so does a key without a query."""
    n, count = 150, 600
    inputs, d_out = qkv((2, n, count, 4, 2, 24), dtype), torch.randn(2, n, 4, 24)
    bias = torch.zeros(2, count)
    bias[0, 100:400] = bias[1] = -torch.inf
    first, last = torch.zeros(2, 2, count).long()
    last[:] = n
    first[:, 400:], last[:, 450:] = 60, 100  # some queries see more keys
    first[0, :100] = 20
    last[0, 550:] = 0
    given = {"bias": bias, "first": first, "last": last}
    check_gradients(inputs, "cpu", given, d_out, "hidden")
    for part in ({"bias": bias}, {"first": first + n}, {"last": last * 0 - 1}):
        check_gradients(inputs, "cpu", part, d_out, str(list(part)))
    found = gradients(inputs, "cpu", given, d_out)
    assert not any(g[1].any() for g in found)
    assert not found[0][0, :20].any() and found[0][0, 20:].any()
    for of_key in found[1:]:
        assert not of_key[0, 100:400].any() and not of_key[0, 550:].any()
    assert not any(g.any() for g in gradients(inputs, "cpu", {"first": first + n}, d_out))


@every_isa
@every_dtype
def test_invisible_keys_may_hold_anything(kernels, dtype):  # noqa: F811
    shape = (2, 70, 150, 4, 2, 40)
    (q, k, v), bias = qkv(shape, dtype), torch.zeros(2, 150)
    bias[:, 3:60] = bias[1, 100:] = -torch.inf
    given, d_out = {"bias": bias}, torch.randn(q.shape)
    clean = gradients((q, k, v), "cpu", given, d_out)
    for junk in (torch.nan, torch.inf, torch.finfo(dtype).max):
        k[:, 3:60], v[:, 3:60] = junk, -junk
        found = gradients((q, k, v), "cpu", given, d_out)
        assert all(map(torch.equal, found, clean))
    q[1, 3, 0] = torch.nan  # harms its own head of keys, and no other row
    found = gradients((q, k, v), "cpu", given, d_out)
    for after, before in zip(found, clean, strict=True):
        assert torch.equal(after[0], before[0])
    assert found[0][1, 3, 0].isnan().all() and found[1][1, :3, 0].isnan().all()
    assert torch.equal(found[1][1, :, 1], clean[1][1, :, 1])


@every_isa
@every_dtype
def test_a_key_that_has_nearly_all_the_weight(kernels, dtype):  # noqa: F811
    """dS is then a small difference: taken from an output in 16 bits, it would be rounding."""
    q, k, v = qkv((2, 60, 40, 4, 2, 32), dtype)
    inputs, d_out = [q, k, v + 5], torch.randn(q.shape).to(dtype)
    bias = torch.zeros(2, 40)
    bias[:, 7] = 8.0
    truths = gradients(inputs, "reference", {"bias": bias}, d_out, torch.double)
    plain = gradients(inputs, "reference", {"bias": bias}, d_out)
    found = gradients(inputs, "cpu", {"bias": bias}, d_out)
    for name, *each in zip("qkvb", found, plain, truths, strict=True):
        assert_close(*each, f"d{name}")


@every_isa
@pytest.mark.parametrize("step", [-40, 3, 6.1, 300])
def test_scores_that_rise_from_tile_to_tile(kernels, step):  # noqa: F811
    n, count, d = 20, 1100, 8
    q, k, v = torch.ones(1, n, 1, d), torch.randn(1, count, 1, d), torch.randn(1, count, 1, d)
    bias = (torch.arange(count) // 64 * float(step))[None]
    q[:, ::3] = -1
    check((q, k, v), {"bias": bias, "scale": 1.0}, f"by {step}")


@every_isa
@two_dtypes
@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_steps_of_keys_and_of_queries(kernels, dtype, step):  # noqa: F811
    """Terms of distances that lie side by side, and those that are looked up."""
    n, count, heads = 50, 60, 4
    inputs, keys = qkv((1, n, count, heads, 2, 8), dtype), torch.arange(count)[None] * step
    for queries in (torch.arange(n), torch.randint(-5000, 5000, (n,)), torch.arange(n) / 4 + 0.3):
        relative = vf.distance_bias(t5_table(heads), queries=queries[None], keys=keys)
        check(inputs, {"relative": relative, "scale": 1.0}, f"{step} {queries[:4].tolist()}")


@every_isa
@every_dtype
def test_strides(kernels, dtype):  # noqa: F811
    q, k, v = qkv((2, 45, 70, 4, 2, 40), dtype)
    d_out = torch.randn(q.shape).to(dtype)

    def views(t):
        yield t.transpose(1, 2).contiguous().transpose(1, 2)  # heads first
        yield t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)  # between two words
        yield torch.cat([t, t], 2)[:, :, : t.shape[2]]  # queries, keys and values in one tensor
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        yield wide[..., ::2]  # no unit stride
        yield t.flip(1).flip(1)

    call = op.Attention(q, k, v, op.Visible(), None, 0.3)
    expected = cpu.grouped_attention_backward(d_out, call)
    for *inputs, gradient in zip(*map(views, (q, k, v, d_out)), strict=True):
        found = cpu.grouped_attention_backward(gradient, op.Attention(*inputs, *call[3:]))
        assert all(map(torch.equal, found, expected))
    one = [t[:1, :1].expand(2, 37, -1, -1) for t in (q, k, v)]
    check(one, {}, "expanded")
    leaf = q.clone().requires_grad_()  # out.sum() has a gradient of stride 0
    vf.grouped_attention(leaf, k, v, backend="cpu").sum().backward()
    ones = gradients((q, k, v), "cpu", {}, torch.ones(q.shape))
    assert torch.equal(leaf.grad, ones[0])


@every_isa
@two_dtypes
def test_threads_change_nothing(kernels, dtype):  # noqa: F811
    before, made = torch.get_num_threads(), []
    given, count = decoder(500, 4, 30, rows=1)
    cases = [(qkv((1, 500, count, 6, 2, 24), dtype), given)]  # chunks of queries
    shape = (4, 130, 70, 12, 6, 16)  # and none
    cases.append((qkv(shape, dtype), options("t5 attention", shape)))
    d_out = [torch.randn(inputs[0].shape) for inputs, _ in cases]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append([
                g for (inputs, given), d in zip(cases, d_out, strict=True)
                for g in gradients(inputs, "cpu", given, d)
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(map(torch.equal, made[0], other))


@every_kind
def test_gradcheck(kind):
    """In double, through the portable kernels' own code."""
    for shape in ((2, 3, 5, 4, 2, 3), (1, 40, 9, 6, 1, 2)):
        given = options(kind, shape, 2)
        inputs = [t.double().requires_grad_() for t in qkv(shape)]
        bias = torch.randn(shape[0], shape[2]).double()
        bias[:, 1] = -1e3
        inputs.append(bias.requires_grad_())

        def attend(q, k, v, bias, given=given):
            return vf.grouped_attention(q, k, v, backend="cpu", **given | {"bias": bias})

        assert torch.autograd.gradcheck(attend, inputs)


def test_a_trained_table_of_distances_has_its_gradient():
    """No kernel makes it: `auto` runs the reference."""
    shape, made = (2, 19, 12, 4, 4, 8), []
    inputs, table = qkv(shape), t5_table(4)
    members = torch.rand(2, 12, 4) < 0.7
    for dtype, backend in ((torch.double, "reference"), (torch.float32, "auto")):
        leaf = table.to(dtype).requires_grad_()
        positions, starts = torch.arange(19).expand(2, 19), torch.arange(0, 48, 4).expand(2, 12)
        relative = vf.distance_bias(
            leaf, queries=positions, keys=starts, members=members, dtype=dtype
        )
        given = {"relative": relative, "scale": 1.0, "backend": backend}
        out = vf.grouped_attention(*(t.to(dtype) for t in inputs), **given)
        made.append(torch.autograd.grad(out.square().sum(), leaf)[0].double())
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_bias_has_a_gradient_where_it_is_wanted(wanted, monkeypatch):
    inputs = [t.requires_grad_() for t in qkv((2, 9, 6, 4, 2, 8))]
    bias = torch.randn(2, 6, requires_grad=wanted)
    made, load = [], extension.load()

    class Spy:
        def __getattr__(self, name):
            if name != "AttentionBackward":
                return getattr(load, name)
            return lambda **given: made.append(given["d_bias"]) or load.AttentionBackward(**given)

    monkeypatch.setattr(cpu.extension, "load", Spy)
    vf.grouped_attention(*inputs, bias=bias, backend="cpu").square().sum().backward()
    assert (bias.grad is not None) == wanted and [address != 0 for address in made] == [wanted]
    exact = [t.detach().clone().requires_grad_() for t in inputs]
    out = vf.grouped_attention(*exact, bias=bias.detach(), backend="reference")
    out.square().sum().backward()
    for t, e in zip(inputs, exact, strict=True):
        torch.testing.assert_close(t.grad, e.grad, atol=1e-5, rtol=1e-4)


def test_the_backward_op_refuses_what_does_not_fit():
    """It reads and writes addresses."""
    q, k, v = qkv((2, 9, 6, 4, 2, 8))
    call = op.Attention(q, k, v, op.Visible(torch.zeros(2, 6)), None, 1.0)
    assert len(cpu.grouped_attention_backward(q, call)) == 4
    for d_out in (q[:1], q[:, :8], q[..., :4], q.double(), q.bfloat16(), q.to("meta")):
        with pytest.raises(ValueError, match="does not fit"):
            cpu.grouped_attention_backward(d_out, call)
    for other in (call._replace(keys=k[:, :5]), call._replace(values=v[..., :4])):
        with pytest.raises(ValueError, match="does not fit"):
            cpu.grouped_attention_backward(q, other)


def test_nothing_of_the_output_is_kept_for_gradients():
    leaf, k, v = qkv((1, 30, 20, 4, 2, 16))
    out = vf.grouped_attention(leaf.requires_grad_(), k, v, backend="cpu")
    assert out.grad_fn is not None
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert all(t.data_ptr() != out.data_ptr() for t in saved)
