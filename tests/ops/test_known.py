"""What is known of calls that look alike: kept while they do, and nothing of it after a change."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cases import CUDA, GPU, TRITON, assert_close, cast, feed_forward, moved, plugin
from variator_kernels import functional as vf
from variator_kernels.ops import known as module
from variator_kernels.ops.known import known

D, F, K, R = 24, 40, 4, 8
BF16 = torch.bfloat16
BACKENDS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(not status.usable, reason=status.detail),
            *([pytest.mark.gpu] if GPU else []),
        ],
    )
    for name, status in (("triton", TRITON), ("cuda", CUDA))
]
each = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(module, "_known", {})


def case(backend="reference", dtype=BF16, kind="t5", n=13, r=R):
    made = torch.randn(2, n, D).to(dtype), plugin(D, K, r, dtype), feed_forward(D, F, dtype, kind)
    return moved(made, backend)


def check(x, p, ffn, backend, **options):
    """Of a call, and of one more that looks alike."""
    with torch.no_grad():
        wide = x.double(), cast(p, torch.double), cast(ffn, torch.double)
        truth = vf.compressed_ffn(*wide, backend="reference", **options)
        plain = vf.compressed_ffn(x, p, ffn, backend="reference", **options)
        for _ in range(2):
            assert_close(vf.compressed_ffn(x, p, ffn, backend=backend, **options), plain, truth)


def plans():
    return [plan for each in module._known.values() for plan in each.plans.values()]


@each
@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
def test_one_plan_for_all_that_look_alike(backend, kind):
    for _ in range(2):
        check(*case(backend, kind=kind), backend)
    assert len(plans()) == 1


@each
def test_written_weights_count(backend):
    x, p, ffn = case(backend)
    check(x, p, ffn, backend)
    for weight in (*p[:6], ffn.w_in, ffn.w_out, ffn.norm_weight):
        weight.mul_(-0.5)
        weight.data.add_(0.25)
    check(x, p, ffn, backend)
    assert len(plans()) == 1


@each
@pytest.mark.parametrize("r", [R, 64])
def test_other_memory_counts(backend, r):
    """Rows further apart, columns first, rows that start nowhere in particular."""
    x, p, ffn = case(backend, r=r)
    check(x, p, ffn, backend)
    apart = x.new_zeros(2, 13, D + 8)[..., :D].copy_(x)
    check(apart, p, ffn, backend)
    check(x.transpose(0, 1).contiguous().transpose(0, 1), p, ffn, backend)
    columns = ffn._replace(w_in=ffn.w_in.t().contiguous().t())
    check(x, p._replace(w1=p.w1.t().contiguous().t()), columns, backend)
    for shift in (1, 8):
        shifted = x.new_zeros(x.numel() + shift)[shift:].view(x.shape).copy_(x)
        w_in = x.new_zeros(F * D + shift)[shift:].view(F, D).copy_(ffn.w_in)
        check(shifted, p, ffn._replace(w_in=w_in), backend)
    check(x, p, ffn, backend)


@each
@pytest.mark.parametrize("r", [R, 64])
def test_where_memory_lies_counts(backend, r):
    """Forms are alike, but what is copied, because it starts nowhere in particular, is not."""
    x, p, ffn = case(backend, r=r)
    wide = x.new_zeros(2, 13, D + 8)
    flat = x.new_zeros(p.w1.numel() + 8)
    for columns, shift in ((4, 4), (0, 0), (4, 0), (0, 4), (4, 4), (0, 0)):
        part = wide[..., columns : columns + D].copy_(x)
        w1 = flat[shift : shift + p.w1.numel()].view(p.w1.shape).copy_(p.w1)
        check(part, p._replace(w1=w1), ffn, backend)


def test_one_tensor_twice_is_known():
    x, p, ffn = case()
    tied = ffn._replace(b_out=p.b2)
    with torch.no_grad():
        assert known(x, p, tied) is known(x, p, tied)
        assert known(x, p, ffn) is not known(x, p, tied)


def test_there_are_never_many(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 3)
    monkeypatch.setattr(module, "_MOST_PLANS", 2)
    with torch.no_grad():
        for n in range(1, 9):
            found = known(*case(n=n))
    assert len(module._known) == 3
    for key in range(5):
        found.keep(key, key)
    assert found.plans == {4: 4}


def test_other_arguments_of_the_private_class(monkeypatch):
    """Nobody promises what it takes."""

    class Guards:
        def TensorGuards(self, *tensors, **named):
            raise TypeError("dynamic_dims_sizes")

    monkeypatch.setattr(module, "guards", Guards())
    assert known(*case()) is None


@each
def test_other_groups_count(backend):
    x, p, ffn = case(backend)
    check(x, p, ffn, backend)
    mask = moved(torch.arange(13) < torch.tensor([[13], [6]]), backend)
    keep = moved(torch.rand(2, 13) < 0.3, backend)
    offsets = moved(torch.tensor([0, 5, 11]), backend)
    for options in ({"mask": mask}, {"mask": mask.flip(1)}, {"keep_first": 1}, {"keep": keep},
                    {"keep_last": 2, "mask": mask}, {}):  # fmt: skip
        check(x, p, ffn, backend, **options)
    rows = x.view(-1, D)[:13]
    check(rows, p, ffn, backend, cu_seqlens=offsets)
    check(rows, p, ffn, backend, cu_seqlens=offsets[:2])


@each
def test_other_dtypes_count(backend):
    x, p, ffn = case(backend)
    check(x, p, ffn, backend)
    check(x.half(), cast(p, torch.half), cast(ffn, torch.half), backend)
    check(x, p._replace(b1=p.b1.float()), ffn._replace(norm_weight=None), backend)


@each
def test_whoever_looks_on_still_does(backend):
    """A mode sees the registered op, and a gradient is made."""

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    x, p, ffn = case(backend)
    check(x, p, ffn, backend)
    with Seen() as seen, torch.no_grad():
        vf.compressed_ffn(x, p, ffn, backend=backend)
    assert "variator::compressed_ffn" in seen.names
    x.requires_grad_()
    vf.compressed_ffn(x, p, ffn, backend=backend).float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    with torch.inference_mode():
        check(x.detach(), p, ffn, backend)


def test_a_tensor_that_changed_in_place_is_checked_again():
    x, p, ffn = case()
    vf.compressed_ffn(x, p, ffn, backend="reference")
    vf.compressed_ffn(x, p, ffn, backend="reference")
    w_in = ffn.w_in
    before = w_in.data
    for other, why in ((before[:, :-1], "w_in must have shape"), (before.long(), "floating")):
        w_in.data = other
        with pytest.raises(ValueError, match=why):
            vf.compressed_ffn(x, p, ffn, backend="reference")
    w_in.data = before
    with pytest.raises(ValueError, match="additive"):
        vf.compressed_ffn(x, p, ffn, mask=torch.zeros(2, 13) - 1, backend="reference")
    with pytest.raises(ValueError, match=r"must have shape \[tokens, hidden\]"):
        vf.compressed_ffn(x, p, ffn, cu_seqlens=torch.tensor([0, 3]), backend="reference")
    with pytest.raises(ValueError, match="activation"):
        vf.compressed_ffn(x, p._replace(activation="sine"), ffn, backend="reference")
    with pytest.raises(ValueError, match="activation"):
        vf.compressed_ffn(x, p._replace(activation=["tanh"]), ffn, backend="reference")


def test_what_a_form_is():
    x, p, ffn = case()
    first = known(x, p, ffn)
    assert first is known(torch.zeros_like(x), cast(p, BF16), ffn) and not first.checked
    assert first.direct
    others = [
        (x[:, :-1], p, ffn),
        (x, p, ffn._replace(eps=1.0)),
        (x, p, ffn._replace(b_in=torch.zeros(F, dtype=BF16))),
        (x, p, ffn._replace(b_gate=torch.zeros(F, dtype=BF16))),
        (x, p._replace(b2=torch.zeros(2 * D, dtype=BF16)[::2]), ffn),
        (x, p._replace(b2=torch.nn.Parameter(p.b2)), ffn),
        (x, p._replace(b2=p.b2.to("meta")), ffn),
    ]
    assert all(known(*other) is not first for other in others)
    assert not known(*others[-1]).direct and not known(*others[-2]).direct
    assert known(x.to_sparse(), p, ffn) is None
    assert known(x, p._replace(b2=None), ffn) is None
    with torch.no_grad():
        assert known(*others[-2]).direct


def test_no_more_is_kept_than_a_few_hundred(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 3)
    x, p, ffn = case()
    for n in range(1, 8):
        known(x[:, :n], p, ffn)
    assert len(module._known) == 3


@pytest.mark.skipif(not TRITON.usable, reason=TRITON.detail)
def test_other_launch_settings_count():
    from variator_kernels.triton_kernels import launch

    x, p, ffn = case("triton")
    check(x, p, ffn, "triton")
    before = launch.table()
    try:
        launch.use([dict(row) for row in before])
        check(x, p, ffn, "triton")
    finally:
        launch.use(before)
    assert len(plans()) == 2


def test_forms_of_kept_tensors():
    """Other numbers keep them; sizes and dtypes that change in place do not."""
    first, second = torch.randn(3, 4), torch.nn.Parameter(torch.randn(5))
    forms = module.Forms([first, second, first])
    assert forms.hold()
    first.mul_(2)
    with torch.inference_mode():
        assert forms.hold()
    second.data = torch.randn(6)
    assert not forms.hold()
    second.data = torch.randn(5)
    assert forms.hold()
    second.data = second.data.to(BF16)
    assert not forms.hold()
