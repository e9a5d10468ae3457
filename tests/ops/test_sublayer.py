"""A sublayer in one call of the extension gives, bit for bit, what its kernels give one by one."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.sublayers import DTYPES, PRECISIONS, D, inputs, same
from variator_kernels.ops import cpu_arguments, dense, listed, prepack, rows_linear
from variator_kernels.ops.adapter_decompress import cpu as decompress
from variator_kernels.ops.arguments import flat
from variator_kernels.ops.compressed_ffn import cpu as compressed
from variator_kernels.ops.compressed_ffn.layered import normalize_real
from variator_kernels.ops.feed_forward import FFN_ACTIVATIONS, FeedForward, PluginWeights
from variator_kernels.ops.group_merge import cpu as merge
from variator_kernels.ops.groups import Groups
from variator_kernels.ops.int8_linear import packed as int8

pytestmark = [cases.needs_cpu, pytest.mark.usefixtures("own_products", "own_norms")]
F, R = 72, 9


def ffn_of(dtype: torch.dtype, norm: str, post: bool, gated: bool, activation: str) -> FeedForward:
    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    weight, bias = (1 + random(1, D)[0]).to(dtype), random(1, D)[0]
    return FeedForward(
        random(F, D),
        random(D, F),
        random(F, D) if gated else None,
        random(1, F)[0],
        None if gated else random(1, D)[0],
        activation=activation,
        norm=norm,
        norm_weight=None if norm == "none" else weight,
        norm_bias=bias if norm == "layer" else None,
        post_norm=post and norm != "none",
        residual=not (gated and post),
    )


def product(weight: Tensor, bias: Tensor | None, ffn: FeedForward, isa: str):
    if ffn.precision == "int8":
        return int8.packed(weight, bias, isa).product.multiply
    packed = rows_linear.stacked((weight,), (bias,), weight.dtype, isa)
    return lambda x, activation="none", other=None: packed(x, activation, other)


def in_steps(x: Tensor, plugin: PluginWeights, ffn: FeedForward, groups: Groups) -> Tensor:
    """The definition: each kernel by its own binding."""
    isa, dtype, rows = prepack.instruction_set(), x.dtype, flat(x)
    lists = listed._listed(groups, len(rows), compact=True)
    y = torch.zeros(x.shape, dtype=dtype)
    residual = rows if ffn.residual else None
    if ffn.residual:
        listed.copy_outside(lists, rows, y.view(-1, D))
    count = lists.kernel.count
    if count == 0:
        return y
    merged, poison = torch.empty(count, D, dtype=dtype), torch.empty(count)
    projected = torch.empty(len(rows), plugin.b1.shape[0])
    packed = cpu_arguments.prepack_merge(plugin.merge, ffn.pre_norm, dtype, isa)
    merge.run(rows, lists, packed, merge.Outputs(merged, projected, None, poison))
    inner = product(ffn.w_in, ffn.b_in, ffn, isa)(merged, ffn.activation)
    if ffn.w_gate is not None:
        inner = product(ffn.w_gate, ffn.b_gate, ffn, isa)(merged, "none", inner)
    u = product(ffn.w_out, ffn.b_out, ffn, isa)(inner, "none")
    adapter = cpu_arguments.prepack_adapter(plugin.adapter, dtype, isa)
    decompress.run(decompress.Inputs(u, projected, residual, poison), lists, adapter, y.view(-1, D))
    return normalize_real(y, ffn.any_norm, groups) if ffn.post_norm else y


def at_once(monkeypatch, *arguments) -> Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(compressed, "_in_steps", None)
        return compressed.compressed_ffn(*arguments)


KINDS = [*cases.MASKS, "kept", "strided", "NaN", "varlen", "nothing"]


@pytest.mark.parametrize("isa", cases.INT8_ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_ffn(monkeypatch, dtype, precision, isa):
    cases.CPU.set_isa(isa)
    norms = itertools.product(("none", "rms", "layer"), (False, True), (False, True))
    for number, (norm, post, gated) in enumerate(norms):
        activation = FFN_ACTIVATIONS[number % len(FFN_ACTIVATIONS)]
        ffn = ffn_of(dtype, norm, post, gated, activation)._replace(precision=precision)
        for ratio, kind in zip(itertools.cycle((4, 2, 16)), KINDS, strict=False):
            torch.set_num_threads(1 + number % 2)
            x, groups = inputs(dtype, kind, ratio)
            arguments = x, cases.plugin(D, ratio, R, dtype), ffn, groups
            for _ in range(2):  # packed, and found
                found = at_once(monkeypatch, *arguments)
                assert same(found, in_steps(*arguments)), (norm, post, gated, kind, ratio)
            if kind == "NaN":
                assert found.isnan().any() and not found.isnan().all()


@pytest.mark.parametrize("isa", cases.INT8_ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_ffn(monkeypatch, dtype, precision, isa):
    cases.CPU.set_isa(isa)
    norms = itertools.product(("none", "rms", "layer"), (False, True), (False, True))
    for number, (norm, post, gated) in enumerate(norms):
        activation = FFN_ACTIVATIONS[number % len(FFN_ACTIVATIONS)]
        ffn = ffn_of(dtype, norm, post, gated, activation)._replace(precision=precision)
        apart = gated and not post and norm == "layer" and dtype == torch.float32
        for kind in ("none", "strided", "NaN", "varlen", "many"):
            torch.set_num_threads(1 + number % 2)
            x, _ = inputs(dtype, kind, 1)
            with monkeypatch.context() as patched:
                if precision == "int8" or not apart:  # else PyTorch's norm goes in front
                    patched.setattr(dense, "_pass", None)
                found = [dense.feed_forward(x, ffn) for _ in range(2)]
            with monkeypatch.context() as patched:
                patched.setattr(dense, "_whole", lambda *_: None)
                steps = dense.feed_forward(x, ffn)
            assert same(found[0], steps) and same(found[1], steps), (norm, post, gated, kind)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_groups_than_pass_at_once(monkeypatch, precision, threads):
    torch.set_num_threads(threads)
    ffn = ffn_of(torch.float32, "layer", True, False, "gelu")._replace(precision=precision)
    x, groups = inputs(torch.float32, "many", 2)
    arguments = x, cases.plugin(D, 2, R, torch.float32), ffn, groups
    assert same(at_once(monkeypatch, *arguments), in_steps(*arguments))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_write_to_any_source_is_noticed(monkeypatch, precision, post):
    dtype = torch.float32
    ffn = ffn_of(dtype, "layer", post, not post, "silu")._replace(precision=precision)
    plugin = cases.plugin(D, 4, R, dtype)
    x, groups = inputs(dtype, "right", 4)
    before = at_once(monkeypatch, x, plugin, ffn, groups)
    of_ffn = (t for t in (*ffn[:6], ffn.norm_weight, ffn.norm_bias) if t is not None)
    for source in (*plugin[:6], *of_ffn):
        source.data.view(-1)[0] += 0.25
        found = at_once(monkeypatch, x, plugin, ffn, groups)
        assert not same(found, before)
        assert same(found, in_steps(x, plugin, ffn, groups))
        before = found


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_write_to_any_source_of_a_dense_one_is_noticed(monkeypatch, precision, post):
    monkeypatch.setattr(dense, "_pass", None)
    norm = "layer" if precision or post else "rms"
    ffn = ffn_of(torch.float32, norm, post, not post, "silu")._replace(precision=precision)
    x, _ = inputs(torch.float32, "none", 1)
    before = dense.feed_forward(x, ffn)
    for source in (t for t in (*ffn[:6], ffn.norm_weight, ffn.norm_bias) if t is not None):
        source.data.view(-1)[0] += 0.25
        found = dense.feed_forward(x, ffn)
        assert not same(found, before)
        fresh = FeedForward(*(t.clone() if isinstance(t, Tensor) else t for t in ffn))
        assert same(found, dense.feed_forward(x, fresh))
        before = found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_that_is_not_finite_runs_in_steps(monkeypatch, precision):
    ffn = ffn_of(torch.float32, "none", False, False, "relu")._replace(precision=precision)
    plugin = cases.plugin(D, 4, R, torch.float32)
    x, groups = inputs(torch.float32, "none", 4)
    ffn.w_in[0, 0] = torch.nan
    assert compressed.compressed_ffn(x, plugin, ffn, groups).isnan().all()
    with pytest.raises(TypeError):
        at_once(monkeypatch, x, plugin, ffn, groups)


def test_threads_call_at_once(monkeypatch):
    monkeypatch.setattr(compressed, "_in_steps", None)
    jobs, failures = [], []
    for number, precision in enumerate(PRECISIONS * 2):
        ffn = ffn_of(torch.float32, "rms", False, True, "gelu")._replace(precision=precision)
        x, groups = inputs(torch.float32, KINDS[number], 4)
        arguments = x, cases.plugin(D, 4, R, torch.float32), ffn, groups
        jobs.append((arguments, in_steps(*arguments)))

    def run(first: int) -> None:
        with torch.no_grad():
            for turn in range(60):
                arguments, expected = jobs[(first + turn) % len(jobs)]
                if not same(compressed.compressed_ffn(*arguments), expected):
                    failures.append(turn)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_lists_are_kept_while_nothing_was_written():
    groups = inputs(torch.float32, "right", 4)[1]
    found = listed.listed(groups, 3 * 37, compact=True)
    assert listed.listed(groups, 3 * 37, compact=True) is found
    assert listed.listed(groups, 3 * 37) is not found
    assert listed.listed(groups._replace(), 3 * 37, compact=True) is not found
    groups.span[0, 0] -= 1
    assert listed.listed(groups, 3 * 37, compact=True) is not found
    with pytest.raises(ValueError, match="the mask's size"):
        listed.listed(groups, 3 * 36, compact=True)
    with torch.inference_mode():  # writes are not counted: groups are their maker's alone
        groups = inputs(torch.float32, "right", 4)[1]
        found = listed.listed(groups, 3 * 37)
        assert listed.listed(groups, 3 * 37) is found
        assert listed.listed(groups._replace(), 3 * 37) is not found
