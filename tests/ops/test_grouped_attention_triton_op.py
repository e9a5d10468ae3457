"""grouped_attention's Triton kernels as an op: autograd, compilers, and what they refuse."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.ops.attention_cases import options, qkv, t5_table
from tests.ops.cases import moved
from tests.ops.test_grouped_attention_triton import arguments, every_kind, pytestmark  # noqa: F401
from variator_kernels import functional as vf
from variator_kernels.ops.grouped_attention import op


@pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="needs expecttest")
@every_kind
def test_opcheck(kind):
    shape = (2, 5, 6, 4, 2, 8)
    given = arguments(options(kind, shape))
    inputs = [moved(t, "triton").requires_grad_() for t in qkv(shape)]
    visible = [given.get(name) for name in ("bias", "first", "last")]
    relative = given.get("relative") or (None,) * 4 + (0,)
    call = (*inputs, *visible, *relative, 0.3, "triton")
    torch.library.opcheck(torch.ops.variator.grouped_attention.default, call)


@every_kind
def test_gradcheck(kind):
    shape = (1, 3, 5, 4, 2, 3)
    given = arguments(options(kind, shape, 2))
    inputs = [moved(t.double(), "triton").requires_grad_() for t in qkv(shape)]
    bias = moved(torch.randn(1, 5).double(), "triton").requires_grad_()

    def attend(q, k, v, bias):
        return vf.grouped_attention(q, k, v, backend="triton", **given | {"bias": bias})

    assert torch.autograd.gradcheck(attend, (*inputs, bias))


def test_compiles_whole():
    torch._dynamo.reset()
    shape = (1, 9, 12, 4, 2, 16)
    inputs, given = [moved(t, "triton") for t in qkv(shape)], arguments(options("bias", shape))

    def layer(q, k, v, bias):
        return 2 * vf.grouped_attention(q, k, v, bias=bias, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, plain = (f(*inputs, given["bias"]) for f in (compiled, layer))
    assert torch.equal(found, plain)
    made = []
    for f in (compiled, layer):
        leaves = [t.clone().requires_grad_() for t in (*inputs, torch.randn(1, 12).to(inputs[0]))]
        leaves[3].data.zero_()
        made.append(torch.autograd.grad(f(*leaves).square().sum(), leaves))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    inputs = [moved(t, "triton").requires_grad_() for t in qkv((2, 9, 5, 4, 2, 8))]
    made = []
    for enabled in (False, True):
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=enabled):
            out = vf.grouped_attention(*inputs, backend="triton")
        made.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for plain, cast in zip(*made, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        assert torch.equal(plain, cast)


def test_second_derivatives_are_refused():
    inputs = [moved(t, "triton").requires_grad_() for t in qkv((1, 2, 3, 1, 1, 8))]
    out = vf.grouped_attention(*inputs, backend="triton")
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_a_sublayer_on_triton_attends_by_its_kernel(monkeypatch):
    """The placements around attention; with dropout of weights, plain PyTorch."""
    from variator_kernels.ops import self_attention
    from variator_kernels.ops.grouped_attention import triton

    d, asked = 16, []
    run_kernel = triton.grouped_attention
    monkeypatch.setattr(
        triton, "grouped_attention", lambda call: (asked.append(1), run_kernel(call))[1]
    )
    x, source = moved((torch.randn(1, 9, d), torch.randn(1, 4, d)), "triton")
    weights = [moved(torch.randn(d, d) / 4, "triton") for _ in range(4)]
    for dropout, ran in ((0.0, 1), (0.5, 0)):
        asked.clear()
        sublayer = self_attention.SelfAttention(
            *weights, 8, 0.3, dropout_weights=dropout, pack=False
        )
        keys = self_attention.Keys(moved(torch.tensor([[4, 4, 1, 0]]).log(), "triton"))
        out = self_attention.attend(x, source, sublayer, keys, None, "triton")
        assert len(asked) == ran and out.isfinite().all()
        if not dropout:
            plain = self_attention.attend(x, source, sublayer, keys, None, "reference")
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_what_it_has_not_is_refused_by_name():
    inputs = [moved(t, "triton") for t in qkv((1, 3, 4, 2, 1, 8))]
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .* no dropout"):
        vf.grouped_attention(*inputs, dropout_p=0.1, backend="triton")
    table = moved(t5_table(2), "triton").requires_grad_()
    places = moved(torch.arange(4)[None], "triton")
    relative = vf.distance_bias(table, queries=places[:, :3], keys=places)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .* no gradient .* table"):
        vf.grouped_attention(*inputs, relative=relative, backend="triton")


def test_the_op_itself_refuses_what_does_not_fit():
    """It reads addresses: a wrong shape must not become a wrong address."""
    shape = (2, 9, 6, 4, 2, 8)
    (q, k, v), given = (
        moved(tuple(qkv(shape)), "triton"),
        arguments(options("t5 attention_kv", shape)),
    )
    relative = given["relative"]
    bias, starts = q.new_zeros(2, 6), relative.keys
    call = op.Attention(q, k, v, op.Visible(bias), relative, 1.0)
    assert op.grouped_attention(call, "triton").shape == q.shape
    wrong = [
        call._replace(keys=k[:, :5]),
        call._replace(values=v[..., :4]),
        call._replace(queries=q[:1]),
        call._replace(queries=q[:, :, :3]),
        call._replace(visible=op.Visible(bias[:, :5])),
        call._replace(visible=op.Visible(None, bias.int().t())),
        call._replace(relative=relative._replace(keys=starts[:1])),
        call._replace(relative=relative._replace(queries=starts)),
        call._replace(relative=relative._replace(values=relative.values[:, :3])),
    ]
    if not torch.cuda.is_available():
        wrong.append(call._replace(relative=relative._replace(pattern=relative.pattern + 1000)))
    for other in wrong:
        with pytest.raises(ValueError, match="does not fit"):
            op.grouped_attention(other, "triton")
