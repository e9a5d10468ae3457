"""What is particular to the CUDA kernels; shapes, dtypes and masks of every backend: tests/ops."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.tools import sanitize
from tests.ops.cases import GPU, assert_close, cast, feed_forward, masked, moved, plugin
from tests.ops.test_backward import gradients
from variator_kernels import functional as vf
from variator_kernels.ops.compressed_ffn import cuda as sublayer
from variator_kernels.ops.cuda_arguments import groups_kernel
from variator_kernels.ops.gpu_arguments import GpuGroups
from variator_kernels.ops.make_groups import make_groups

BF16 = torch.bfloat16


@pytest.fixture(params=["one launch", "launches"])
def way(request, monkeypatch):
    """Both ways through the sublayer, whatever its size."""
    limit = 10**9 if request.param == "one launch" else 0
    monkeypatch.setattr(sublayer, "ONE_LAUNCH_GROUPS", limit)


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch):
    """The order in which the emulation runs threads: a missing barrier shows in one of them."""
    if GPU:
        pytest.skip("a GPU has its own order")
    monkeypatch.setenv("VARIATOR_EMULATION_ORDER", request.param)


def run(x, p, ffn, backend="cuda", **options):
    with torch.no_grad():
        return vf.compressed_ffn(x, p, ffn, backend=backend, **options)


def check(x, p, ffn, **options):
    x, p, ffn = moved((x, p, ffn), "cuda")
    options = {name: moved(value, "cuda") for name, value in options.items()}
    truth = run(x.double(), cast(p, torch.double), cast(ffn, torch.double), "reference", **options)
    plain = run(x, p, ffn, "reference", **options)
    assert_close(run(x, p, ffn, **options), plain, truth)


@pytest.mark.parametrize("kind", ["t5", "v1.1", "bert"])
@pytest.mark.parametrize("mask_kind", ["none", "left", "holes", "empty row"])
def test_both_ways(cuda, way, kind, mask_kind):
    p, ffn = plugin(72, 4, 64, BF16), feed_forward(72, 168, BF16, kind)
    check(torch.randn(3, 61, 72).to(BF16), p, ffn, mask=masked(mask_kind, 3, 61))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[9, 1, 0, 16, 3], [0, 0], []])
@pytest.mark.parametrize("outside", [0, 5])
def test_packed_input(cuda, way, dtype, lengths, outside):
    """Tokens before the first and behind the last sequence pass through."""
    cu = torch.tensor([outside, *lengths]).cumsum(0).int()
    x = torch.randn(int(cu[-1]) + outside, 24).to(dtype)
    p, ffn = plugin(24, 4, 8, dtype), feed_forward(24, 40, dtype, "t5")
    check(x, p, ffn, cu_seqlens=cu)
    y = run(*moved((x, p, ffn), "cuda"), cu_seqlens=moved(cu, "cuda")).cpu()
    assert torch.equal(y[:outside], x[:outside])
    assert torch.equal(y[int(cu[-1]) :], x[int(cu[-1]) :])


# Rows in registers (1 to 4 blocks a warp) or read by blocks, groups of one quad of slots and of
# several, bottlenecks of one chunk and more.
@pytest.mark.parametrize(
    ("d", "k", "r"),
    [(8, 2, 1), (264, 4, 64), (520, 3, 64), (776, 4, 64), (1032, 4, 20), (1288, 2, 64),
     (264, 5, 130), (40, 32, 512), (520, 17, 64), (776, 9, 7), (1032, 10, 130)],
)  # fmt: skip
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sizes_that_choose_a_kernel(cuda, d, k, r, norm):
    p, ffn = plugin(d, k, r, BF16), feed_forward(d, 40, BF16, "t5" if norm == "rms" else "bert")
    check(torch.randn(1, 37, d).to(BF16), p, ffn._replace(post_norm=False))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", ["narrow", "wide", "none"])
@pytest.mark.parametrize("d", [72, 1032])
def test_where_rstd_scales_sums_or_elements(cuda, dtype, weight, d):
    """Large rows: in fp16 x times the weight would overflow before it is divided."""
    p, ffn = plugin(d, 6, 8, dtype), feed_forward(d, 40, dtype, "t5")
    given = {"narrow": 9 * ffn.norm_weight, "wide": 9 * ffn.norm_weight.float(), "none": None}
    ffn = ffn._replace(norm_weight=given[weight])
    x = torch.randn(1, 23, d) * torch.logspace(-2, 4, 23)[None, :, None]
    check(x.to(dtype), p, ffn)


def test_order_of_threads(cuda, order, way):
    p, ffn = plugin(72, 8, 64, BF16), feed_forward(72, 72, BF16, "v1.1")
    x = torch.randn(2, 61, 72).to(BF16)
    check(x, p, ffn, mask=masked("holes", 2, 61))
    dy = torch.randn_like(x)
    once, again = (gradients(x, p, ffn, BF16, "cuda", dy) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("left", [False, True])
def test_a_row_depends_on_itself_alone(cuda, monkeypatch, left):
    """Bit for bit: neither batch mates nor what padding holds can be seen in a row's output."""
    monkeypatch.setattr(sublayer, "ONE_LAUNCH_GROUPS", 0)
    p, ffn = plugin(40, 5, 8, BF16), feed_forward(40, 56, BF16, "v1.1")
    lengths, n = [13, 1, 0, 22], 24
    x, mask = torch.full((4, n, 40), float("nan")).to(BF16), torch.zeros(4, n, dtype=torch.bool)
    for i, length in enumerate(lengths):
        place = slice(n - length, n) if left else slice(0, length)
        x[i, place], mask[i, place] = torch.randn(length, 40).to(BF16), True
    y = run(*moved((x, p, ffn), "cuda"), mask=moved(mask, "cuda")).cpu()
    assert y[~mask].isnan().all()
    for i in range(4):
        alone = run(*moved((x[i, mask[i]][None], p, ffn), "cuda")).cpu()
        assert torch.equal(y[i, mask[i]], alone[0])


def test_nan_stays_in_its_group(cuda, way):
    p, ffn = plugin(24, 4, 8, BF16), feed_forward(24, 40, BF16, "t5")
    x = torch.randn(2, 22, 24).to(BF16)
    clean = run(*moved((x, p, ffn), "cuda")).cpu()
    x[1, 9, 5] = float("nan")
    y = run(*moved((x, p, ffn), "cuda")).cpu()
    group = torch.zeros(2, 22, dtype=torch.bool)
    group[1, 8:12] = True
    assert y[group].isnan().all()
    assert torch.equal(y[~group], clean[~group])


@pytest.mark.parametrize(
    ("what", "d", "k", "r", "f", "dtype"),
    [
        ("hidden size is 20", 20, 4, 8, 40, BF16),
        ("ratio is 33", 24, 33, 8, 40, BF16),
        ("bottleneck is 513", 24, 4, 513, 40, BF16),
        ("inner size is 44", 24, 4, 8, 44, BF16),
        ("dtype is torch.float32", 24, 4, 8, 40, torch.float32),
    ],
)
def test_what_is_refused(cuda, what, d, k, r, f, dtype):
    x, p, ffn = torch.randn(1, 40, d).to(dtype), plugin(d, k, r, dtype), None
    ffn = feed_forward(d, f, dtype, "t5")
    with pytest.raises(ValueError, match=what):
        run(*moved((x, p, ffn), "cuda"))


def test_a_wide_second_product_is_refused(cuda):
    """As transformers keeps T5's wo in fp16."""
    p, ffn = plugin(24, 4, 8, torch.float16), feed_forward(24, 40, torch.float16, "t5")
    values = moved((torch.randn(1, 9, 24).half(), p, ffn._replace(w_out=ffn.w_out.float())), "cuda")
    with pytest.raises(ValueError, match=r"x is torch\.float16 and w_out torch\.float32"):
        run(*values)


def test_strided_input(cuda, way):
    p, ffn = plugin(24, 4, 8, BF16), feed_forward(24, 40, BF16, "t5")
    x = torch.randn(3, 30, 51).to(BF16)
    for view in (x[..., :24], x[..., 3:27], x[:, ::2, :24], x[..., :48:2]):
        check(view, p, ffn)
    w_in = torch.randn(40, 25).to(BF16)[:, 1:] / 5
    check(x[..., :24], p, ffn._replace(w_in=w_in))


QUIET = ("aten::detach", "aten::empty_like", "aten::fill_", "aten::promote_types")


def test_the_sanitizers_workload_runs(cuda, monkeypatch):
    """What bench.tools.sanitize puts under compute-sanitizer, shorter."""
    monkeypatch.setattr(sanitize, "SIZES", sanitize.SIZES[::4])
    monkeypatch.setattr(sanitize, "PRODUCTS", sanitize.PRODUCTS[:1])
    sanitize.workload("cuda", cuda, tokens=11)


class Calls(TorchDispatchMode):
    """Notes every operator that does more than allocate memory (and poison it) or view it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if not (func.is_view or name.startswith("aten::new_") or name in QUIET):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_one_launch_is_one_launch(cuda):
    """Weights as the kernels read them cost no further launch, such as a copy."""
    p, ffn = moved((plugin(72, 4, 64, BF16), feed_forward(72, 168, BF16, "t5")), "cuda")
    x = moved(torch.randn(3, 61, 72).to(BF16), "cuda")
    with Calls() as calls, torch.no_grad():
        sublayer.compressed_ffn(x, p, ffn, make_groups(x, p.ratio, backend="cuda"))
    assert calls.names == []


def test_more_tokens_than_32_bits_count(cuda):
    groups = GpuGroups("plain", None, None, None, None, 2**30, 2**28, 2**29, 2**29, 4)
    with pytest.raises(ValueError, match="2147483648 tokens"):
        groups_kernel(groups)


@pytest.mark.skipif(GPU, reason="a GPU has its own order")
def test_an_order_that_the_emulation_does_not_know(cuda, monkeypatch):
    monkeypatch.setenv("VARIATOR_EMULATION_ORDER", "backwards")
    p, ffn = plugin(24, 4, 8, BF16), feed_forward(24, 40, BF16, "t5")
    with pytest.raises(ValueError, match=r"VARIATOR_EMULATION_ORDER must be .* got backwards"):
        run(torch.randn(1, 9, 24).to(BF16), p, ffn)
