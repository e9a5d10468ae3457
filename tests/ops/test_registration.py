"""The registered ops: opcheck, torch.compile, and what autograd and autocast make of them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.cases import (
    every_backend,
    every_kernel_backend,
    feed_forward,
    masked,
    moved,
    needs_cpu,
    plugin,
)
from variator_kernels import functional as vf
from variator_kernels.ops.compressed_ffn import op as ffn_op
from variator_kernels.ops.groups import NOTHING_KEPT, Keep
from variator_kernels.ops.make_groups import make_groups
from variator_kernels.ops.self_attention import (
    SelfAttention,
    Table,
    Terms,
    members,
    plain_keys,
    whole_queries,
)
from variator_kernels.ops.self_attention import op as attention_op

needs_opcheck = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None, reason="opcheck needs expecttest"
)
D, K, R, N = 24, 4, 8, 19


@pytest.fixture(params=["none", "left"])
def mask(request):
    return masked(request.param, 2, N)


# opcheck looks at schemas, shapes and tracing, the compilers at graphs: a mask beside what else
# there may be is a case, not an axis.
@pytest.fixture(params=[("left", NOTHING_KEPT), ("none", Keep(2, 1))], ids=["mask", "keep"])
def groups_of(request):
    """Makes groups of ``[2, N, ...]`` for a backend: of a mask, or around kept tokens."""
    kind, keep = request.param

    def make(x, backend):
        mask = moved(masked(kind, 2, N), backend)
        return make_groups(x, K, mask=mask, backend=backend, keep=keep)

    return make


def learnable(values):
    return [v.requires_grad_() for v in values]


@needs_opcheck
@every_kernel_backend
def test_opcheck_group_merge(groups_of, backend):
    p = plugin(D, K, R, torch.float32)
    tensors = (torch.randn(2, N, D), *p[:2], torch.ones(D), torch.randn(R, D))
    x, *weights, norm, projection = learnable(moved(tensors, backend))
    arguments = (x, *weights, projection, norm, None, *groups_of(x, backend), "rms", 1e-6, backend)
    torch.library.opcheck(torch.ops.variator.group_merge.default, arguments)


@needs_opcheck
@every_kernel_backend
def test_opcheck_adapter_decompress(groups_of, backend):
    p = plugin(D, K, R, torch.float32)
    adapter = (p.w1[:, :D].clone(), p.b1, p.w2, p.b2)
    projected, residual = moved((torch.randn(2, N, R), torch.randn(2, N, D)), backend)
    groups = groups_of(projected, backend)
    u = moved(torch.randn(*groups.shape(projected), D), backend)
    tensors = learnable((u, projected, *moved(adapter, backend), residual))
    arguments = (*tensors, *groups, "tanh", backend)
    torch.library.opcheck(torch.ops.variator.adapter_decompress.default, arguments)


@needs_opcheck
@needs_cpu
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
def test_opcheck_compressed_ffn(groups_of, kind):
    p, f = plugin(D, K, R, torch.float32), feed_forward(D, 40, torch.float32, kind)
    learnable(p[:6])
    x = torch.randn(2, N, D, requires_grad=True)
    arguments = (
        x, *p[:6], *f[:6], f.norm_weight, f.norm_bias, *groups_of(x, "cpu"),
        f.activation, f.norm, f.eps, f.post_norm, f.residual, "tanh", "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.variator.compressed_ffn.default, arguments)


@needs_cpu
def test_the_op_itself_has_the_layered_gradient(mask):
    p, f = plugin(D, K, R, torch.float32), feed_forward(D, 40, torch.float32, "t5")
    learnable(p[:6])
    x = torch.randn(2, N, D, requires_grad=True)
    a = ffn_op.compressed_ffn(x, p, f, make_groups(x, K, mask=mask), "cpu")
    b = vf.compressed_ffn(x, p, f, mask=mask, backend="cpu")
    torch.testing.assert_close(a, b)
    for got, expected in zip(
        torch.autograd.grad(a.square().sum(), (x, *p[:6])),
        torch.autograd.grad(b.square().sum(), (x, *p[:6])),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mask", "training"), [("none", False), ("left", True)])
@every_backend
def test_compiles_whole(mask, training, backend):
    torch._dynamo.reset()  # it counts how often one function is compiled
    mask = masked(mask, 2, N)
    p, f = plugin(D, K, R, torch.float32), feed_forward(D, 40, torch.float32, "t5")
    x, mask, p, f = moved((torch.randn(2, N, D), mask, p, f), backend)
    if training:
        learnable([x, *p[:6]])

    def layer(x):
        return vf.compressed_ffn(x, p, f, mask=mask, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    if training:
        got = torch.autograd.grad(compiled(x).sum(), p[:6])
        expected = torch.autograd.grad(layer(x).sum(), p[:6])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mask", "by_mask"), [("left", False), ("none", True)])
@every_backend
def test_kept_tokens_compile_whole(mask, by_mask, backend):
    torch._dynamo.reset()
    mask = masked(mask, 2, N)
    p, f = plugin(D, K, R, torch.float32), feed_forward(D, 40, torch.float32, "bert")
    keep = torch.rand(2, N) < 0.3 if by_mask else None
    x, mask, keep, p, f = moved((torch.randn(2, N, D), mask, keep, p, f), backend)

    def layer(x):
        return vf.compressed_ffn(
            x, p, f, mask=mask, keep_first=1, keep_last=2, keep=keep, backend=backend
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


class Keeping(torch.nn.Module):
    """Some tokens stay whole: the first, and with ``by_mask`` those of one."""

    def __init__(self, backend: str, by_mask: bool) -> None:
        super().__init__()
        self.p = plugin(D, K, R, torch.float32)
        self.f = feed_forward(D, 40, torch.float32, "t5")
        self.backend, self.by_mask = backend, by_mask

    def forward(self, x, mask, keep):
        options = {"keep": keep} if self.by_mask else {"keep_first": 3}
        return vf.compressed_ffn(x, self.p, self.f, mask=mask, backend=self.backend, **options)


def kept_inputs(rows, n):
    return torch.randn(rows, n, D), masked("left", rows, n), torch.rand(rows, n) < 0.2


exported_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_cpu)]
)
LENGTHS = ((3, 9), (2, 33), (1, 1), (5, 2))


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("how", ["export", "trace"])
@exported_backends
def test_kept_tokens_export_with_dynamic_sizes(backend, how, by_mask):
    layer = Keeping(backend, by_mask)
    with torch.no_grad():
        if how == "trace":
            program = torch.jit.trace(layer, kept_inputs(3, 9))
        else:
            sizes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("n")},) * 3
            program = torch.export.export(layer, kept_inputs(3, 9), dynamic_shapes=sizes).module()
        for rows, n in LENGTHS:
            values = kept_inputs(rows, n)
            torch.testing.assert_close(program(*values), layer(*values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dynamo"),
    # The newer exporter takes longest, and runs the reference for either backend.
    [
        ("reference", False),
        pytest.param("cpu", False, marks=needs_cpu),
        pytest.param("cpu", True, marks=[needs_cpu, pytest.mark.slow]),
    ],
)
def test_kept_tokens_in_onnx(backend, dynamo, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer, names, path = Keeping(backend, True), ["x", "mask", "keep"], tmp_path / "layer.onnx"
    sizes = {0: "rows", 1: "n"}
    how = (
        {"dynamic_shapes": (sizes,) * 3} if dynamo else {"dynamic_axes": {n: sizes for n in names}}
    )
    with torch.no_grad():
        torch.onnx.export(layer, kept_inputs(3, 9), path, dynamo=dynamo, input_names=names, **how)
        session = runtime.InferenceSession(path)
        for rows, n in LENGTHS[:2]:
            values = kept_inputs(rows, n)
            given = {name: v.numpy() for name, v in zip(names, values, strict=True)}
            got = torch.from_numpy(session.run(None, given)[0])
            torch.testing.assert_close(got, layer(*values), rtol=1e-4, atol=1e-5)


@needs_cpu
def test_compiles_with_inductor_and_dynamic_shapes():
    p, f = plugin(D, K, R, torch.float32), feed_forward(D, 40, torch.float32, "t5")

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(x):
        return 2 * vf.compressed_ffn(x, p, f, backend="cpu")

    with torch.no_grad():
        for rows, n in ((2, 19), (3, 8), (1, 33)):
            x = torch.randn(rows, n, D)
            expected = 2 * vf.compressed_ffn(x, p, f, backend="reference")
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@every_kernel_backend
def test_functional_ops_compile(backend):
    p = plugin(D, K, R, torch.float32)
    x, u, p = moved((torch.randn(2, N, D), torch.randn(2, -(-N // K), D), p), backend)

    def both(x, u):
        merged = vf.group_merge(x, *p[:2], backend=backend)
        return merged, vf.adapter_decompress(u, x, *p[2:6], ratio=K, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, u), both(x, u), strict=True):
        torch.testing.assert_close(a, b)


@needs_opcheck
@needs_cpu
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
def test_opcheck_feed_forward(kind):
    f = feed_forward(D, 40, torch.float32, kind)
    given = (*f[:13], None)
    torch.library.opcheck(torch.ops.variator.feed_forward.default, (torch.randn(2, N, D), *given))


@needs_opcheck
@needs_cpu
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("padded", ["none", "left"])
def test_opcheck_self_attention(merges, padded):
    x, mask, heads = torch.randn(2, N, D), masked(padded, 2, N), 3
    weights = [torch.randn(D, D) for _ in range(4)] + [torch.randn(D), None, torch.randn(D), None]
    attention = SelfAttention(*weights[:4], D // heads, 0.3, *weights[4:], "layer", torch.ones(D))
    groups = make_groups(x, K, mask=mask, backend="cpu") if merges else None
    if groups is None:
        keys, merge = plain_keys(x, mask, Terms(Table(torch.randn(32, heads)))), (None, None)
    else:
        terms = Terms(Table(torch.randn(32, heads)))
        keys = whole_queries(members(groups, x), x, terms)
        merge = plugin(D, K, R, torch.float32)[:2]
    arguments = attention_op.arguments(x, attention, keys, None, merge, groups)
    torch.library.opcheck(torch.ops.variator.self_attention.default, arguments)


@needs_cpu
@pytest.mark.parametrize("merges", [False, True])
def test_flops_of_whole_sublayers(merges):
    """Equal to those of the products that they consist of."""
    x, heads, groups = torch.randn(2, N, D), 3, None
    f = feed_forward(D, 40, torch.float32, "v1.1")
    w_k, w_v = torch.randn(2, D // heads, D)  # one head of keys
    attention = SelfAttention(torch.randn(D, D), w_k, w_v, torch.randn(D, D), D // heads, 0.3)
    count = N
    keys, merge = plain_keys(x, None, Terms()), (None, None)
    if merges:
        groups = make_groups(x, K, backend="cpu")
        count = groups.shape(x)[1]
        keys = whole_queries(members(groups, x), x, Terms())
        merge = plugin(D, K, R, torch.float32)[:2]
    with FlopCounterMode(display=False) as counted:
        attention_op._node(*attention_op.arguments(x, attention, keys, None, merge, groups))
    products = 2 * N * D * D + 2 * count * D * (D // heads) + 2 * N * count * D
    merging = N * (K + 1) * D if merges else 0
    assert counted.get_total_flops() == 2 * 2 * (products + merging)
    with FlopCounterMode(display=False) as counted:
        torch.ops.variator.feed_forward(x, *f[:13], None)
    assert counted.get_total_flops() == 2 * 2 * N * 3 * D * 40


@needs_opcheck
@needs_cpu
@pytest.mark.parametrize("form", ["mask", "keep", "both", "varlen", "nothing"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lists_in_a_graph(form, backend):
    """The groups that are made without one, and empty ones behind; no arithmetic that PyTorch's
    compiler could get wrong."""
    x, mask, keep = torch.randn(3, 11, D), None, NOTHING_KEPT
    options = {}
    if form in ("mask", "both"):
        mask = torch.rand(3, 11) < 0.7
        options["mask"] = mask
    if form == "both":
        keep = Keep(1, 2, torch.rand(3, 11) < 0.2)
    elif form == "keep":
        keep = Keep(2, 1)
    elif form == "varlen":
        x, keep = x.view(33, D), Keep(1)
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 20, 33])
    groups = make_groups(x, K, backend="cpu", keep=keep, **options)
    torch._dynamo.reset()
    made = torch.compile(
        lambda x: make_groups(x, K, backend=backend, keep=keep, **options)[:5],
        fullgraph=True, backend="aot_eager",
    )(x)  # fmt: skip
    count = groups.start.shape[-1]
    rows = groups.span > 0
    assert torch.equal(made[1][..., :count], groups.span) and not made[1][..., count:].any()
    assert torch.equal(made[0][..., :count][rows], groups.start[rows])
    assert (made[3] is None) == (groups.kept is None)
    if groups.kept is not None:
        assert torch.equal(made[3][..., :count], groups.kept) and not made[3][..., count:].any()
    offsets = options.get("cu_seqlens")
    arguments = (x, mask, offsets, keep.mask, made[0].shape[-1], K, keep.first, keep.last)
    torch.library.opcheck(torch.ops.variator.list_groups.default, arguments)
