"""Function transforms and forward-mode derivatives: the reference's values, or a refusal."""

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.ops.cases import every_kernel_backend, feed_forward, masked, moved, needs_cpu, plugin
from tests.sites import tiny
from variator_kernels import functional as vf
from variator_kernels.ops.compressed_ffn import op as ffn_op
from variator_kernels.ops.make_groups import make_groups
from variator_kernels.ops.prepacked_linear import FrozenProducts

D, K, R, N = 8, 4, 3, 11
P = plugin(D, K, R, torch.float64)
FFN = feed_forward(D, 12, torch.float64, "bert")
X, U = torch.randn(2, N, D).double(), torch.randn(2, 3, D).double()
MASK = masked("left", 2, N)
OPS = {
    "merge": (lambda x, **s: vf.group_merge(x, *P[:2], **s), X),
    "adapter, u": (lambda u, **s: vf.adapter_decompress(u, X, *P[2:6], ratio=K, **s), U),
    "adapter, h": (lambda h, **s: vf.adapter_decompress(U, h, *P[2:6], ratio=K, **s), X),
    "ffn, x": (lambda x, **s: vf.compressed_ffn(x, P, FFN, **s), X),
    "ffn, W_c": (lambda w, **s: vf.compressed_ffn(X, P._replace(merge_weight=w), FFN, **s), P[0]),
}
every_op = pytest.mark.parametrize("name", OPS)
REFUSED = r"backend='auto' or 'reference'"


def steps(x):
    """A tangent, no two of its numbers alike: norms do not see a constant."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)


def tangent_of(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, steps(x)))).tangent


def scalar(function):
    return lambda x: function(x).square().sum()


DERIVATIVES = {
    "jvp": lambda f, x: jvp(f, (x,), (steps(x),))[1],
    "forward_ad": tangent_of,
    "forward_ad of a leaf": lambda f, x: tangent_of(f, x.clone().requires_grad_()),
    "grad": lambda f, x: grad(scalar(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f, x: jacrev(lambda x: f(x).sum((0, 1)))(x),
    "jacfwd": lambda f, x: jacfwd(lambda x: f(x).sum((0, 1)))(x),
    "grad of grad": lambda f, x: grad(scalar(grad(scalar(f))))(x),
    "vmap of grad": lambda f, x: vmap(grad(scalar(f)))(torch.stack([x, 2 * x])),
    "hessian": lambda f, x: hessian(lambda s: f(s * x).sum())(torch.ones((), dtype=x.dtype)),
}


@every_op
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_auto_has_the_references_derivatives(name, derivative, mask):
    op, x = OPS[name]
    found, expected = (
        DERIVATIVES[derivative](lambda x: op(x, mask=mask, backend=backend), x)  # noqa: B023
        for backend in ("auto", "reference")
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


@needs_cpu
@every_op
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_kernel_asked_for_by_name_refuses_derivatives(name, derivative):
    op, x = OPS[name]
    with pytest.raises((ValueError, RuntimeError), match=REFUSED):
        DERIVATIVES[derivative](lambda x: op(x, backend="cpu"), x)


@every_op
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("backend", ["auto", pytest.param("cpu", marks=needs_cpu)])
def test_vmap_is_right(name, dtype, backend):
    op, x = OPS[name]
    xs = torch.stack([x, 2 * x])
    masks = torch.stack([MASK, masked("right", 2, N)]).to(dtype)
    found = vmap(lambda x, mask: op(x, mask=mask, backend=backend))(xs, masks)
    expected = [op(x, mask=m, backend="reference") for x, m in zip(xs, masks, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


@every_kernel_backend
@pytest.mark.parametrize("leaf", [False, True])
def test_a_registered_op_refuses_what_it_would_drop(backend, leaf):
    """Called as an exported program calls it, without the public function."""
    x, p, ffn, t = moved((X.float(), to_float(P), to_float(FFN), torch.ones(2, N, D)), backend)
    groups = make_groups(x, K, backend=backend)
    x = x.requires_grad_(leaf)

    def op(x):
        return ffn_op.compressed_ffn(x, p, ffn, groups, backend)

    for derivative in ("jvp", "forward_ad", "grad"):
        with pytest.raises(RuntimeError, match=REFUSED):
            DERIVATIVES[derivative](op, x)
    x = x.detach().requires_grad_()
    y = op(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(lambda dy: torch.autograd.grad(y, x, dy)[0], (t,), (t,))
    with pytest.raises(RuntimeError, match=REFUSED):
        tangent_of(lambda dy: torch.autograd.grad(y, x, dy)[0], t)


def to_float(values):
    return values._replace(
        **{k: v.float() for k, v in values._asdict().items() if isinstance(v, torch.Tensor)}
    )


@needs_cpu
def test_second_derivatives_of_kernels_are_refused():
    x = X.clone().requires_grad_()
    y = vf.compressed_ffn(x, P, FFN).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.functional.hessian(lambda x: vf.compressed_ffn(x, P, FFN).sum(), X)


def test_transforms_compile():
    torch._dynamo.reset()

    def function(x):
        return grad(lambda x: vf.compressed_ffn(x, P, FFN).square().sum())(x)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), function(X))


def test_compiled_code_notices_forward_mode():
    torch._dynamo.reset()

    def function(x):
        return vf.compressed_ffn(x, P, FFN)

    compiled = torch.compile(function, backend="aot_eager")
    compiled(X)
    torch.testing.assert_close(tangent_of(compiled, X), tangent_of(function, X))


@needs_cpu
def test_forward_mode_in_one_thread_disturbs_no_other():
    found = []
    with forward_ad.dual_level():
        run = threading.Thread(
            target=lambda: found.append(vf.compressed_ffn(X, P, FFN, backend="cpu"))
        )
        run.start()
        run.join()
    torch.testing.assert_close(found[0], vf.compressed_ffn(X, P, FFN, backend="cpu"))


@pytest.mark.parametrize("derivative", sorted(DERIVATIVES.keys() - {"jacrev", "jacfwd"}))
def test_packed_products_keep_derivatives(derivative):
    """A dense model whose frozen weights are packed, as in training."""
    sizes = {"d_model": 128, "d_ff": 256, "attn_implementation": "eager"}
    model = tiny.model("bert", **sizes).requires_grad_(False)
    ids, mask = tiny.batch(9, 4)

    def run(x):
        return model(inputs_embeds=x, attention_mask=mask).last_hidden_state

    x = model.get_input_embeddings()(ids)
    expected = DERIVATIVES[derivative](run, x)
    with FrozenProducts(model):
        found = DERIVATIVES[derivative](run, x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def meta(values):
    if isinstance(values, torch.Tensor):
        return values.to("meta")
    made = [meta(v) if isinstance(v, torch.Tensor) else v for v in values]
    return type(values)(*made)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32])
def test_meta_tensors_have_shapes(backend, dtype):
    x, p, ffn = meta(X), meta(P), meta(FFN)
    settings = {"backend": backend, "mask": None if dtype is None else meta(MASK.to(dtype))}
    assert vf.group_merge(x, *p[:2], **settings).shape == (2, 3, D)
    assert vf.adapter_decompress(meta(U), x, *p[2:6], ratio=K, **settings).shape == x.shape
    y = vf.compressed_ffn(x.requires_grad_(), p, ffn, **settings)
    assert y.shape == x.shape and y.is_meta
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
