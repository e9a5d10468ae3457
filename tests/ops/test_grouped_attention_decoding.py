"""grouped_attention for few queries: keys where they lie, chunks of them merged, and the short way
past the dispatcher."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.ops.attention_cases import KINDS, PATHS, expected_output, options, qkv
from tests.ops.cases import DTYPES, ISAS, assert_close, kernels, needs_cpu  # noqa: F401
from variator_kernels import functional as vf
from variator_kernels.ops.grouped_attention import cpu, op

every_isa = pytest.mark.parametrize("kernels", ISAS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Keys of a chunk: 256 for up to 15 vectors that share a head, here 512 for 16 of them.
EDGES = [1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600, 1100]


@torch.no_grad()
def run(inputs, backend, given, dtype=None):
    inputs = [t if dtype is None else t.to(dtype) for t in inputs]
    return vf.grouped_attention(*inputs, backend=backend, **given)


def check(inputs, given, what):
    truth, plain = expected_output(list(inputs), given)
    assert_close(run(inputs, "cpu", given), plain, truth, what)


def cached(shape, dtype, length=None):
    """Keys and values as a cache holds them, heads first, perhaps with room for more."""
    q, k, v = qkv(shape, dtype)
    made = []
    for t in (k, v):
        rows, count, heads, d = t.shape
        room = t.new_full((rows, heads, length or count, d), torch.nan)
        room[:, :, :count] = t.transpose(1, 2)
        made.append(room[:, :, :count].transpose(1, 2))
    return [q, *made]


@every_isa
@every_dtype
@pytest.mark.parametrize("count", EDGES)
def test_few_queries_over_a_cache(kernels, dtype, count):  # noqa: F811
    for heads, kv_heads, d, n in ((9, 3, 64, 1), (8, 1, 40, 2), (4, 4, 128, 3)):
        shape = (2, n, count, heads, kv_heads, d)
        for kind in KINDS:
            inputs = cached(shape, dtype, count + 5)
            check(inputs, options(kind, shape) | {"scale": d**-0.5}, f"{kind} {shape}")


@needs_cpu
@every_dtype
@pytest.mark.parametrize("n", range(1, 17))
def test_numbers_of_queries(dtype, n, monkeypatch):
    monkeypatch.setattr(cpu, "PATH", "direct")
    for heads, kv_heads in ((9, 3), (4, 4), (8, 1)):
        shape = (2, n, 530, heads, kv_heads, 24)
        for kind in ("plain", "causal", "t5 attention"):
            given = options(kind, shape) | {"scale": 0.2}
            check(cached(shape, dtype), given, f"{kind} {shape}")


@every_isa
@every_dtype
def test_chunks_that_some_queries_or_nobody_sees(kernels, dtype):  # noqa: F811
    rows, n, count = 2, 2, 1100
    inputs = cached((rows, n, count, 4, 2, 24), dtype)
    bias, first, last = torch.zeros(rows, count), *torch.zeros(2, rows, count).int()
    last[:] = n
    bias[0, :300] = bias[0, 800:] = -torch.inf  # whole chunks at both ends
    bias[1, 256:512] = -torch.inf
    first[:, 550:], last[:, :550] = 1, 1  # a query sees the one half, the other the other
    for given in (
        {"bias": bias},
        {"first": first, "last": last},
        {"bias": bias, "first": first, "last": last},
        {"bias": torch.full_like(bias, -torch.inf)},
        {"first": last, "last": first},
    ):
        check(inputs, given, ", ".join(given))
    nobody = run(inputs, "cpu", {"bias": torch.full_like(bias, -torch.inf)})
    assert torch.equal(nobody, torch.zeros_like(nobody))


@every_isa
@every_dtype
@pytest.mark.parametrize("step", [-400.0, -7.0, 7.0, 400.0])
def test_chunks_of_far_apart_scores(kernels, dtype, step):  # noqa: F811
    """Sums of a chunk are relative to the chunk's own top."""
    inputs = cached((1, 2, 1300, 2, 1, 16), dtype)
    check(inputs, {"bias": (torch.arange(1300) // 256 * step)[None]}, f"by {step}")


@every_isa
@every_dtype
def test_nan_in_one_chunk_reaches_those_who_see_it(kernels, dtype):  # noqa: F811
    q, k, v = cached((2, 2, 1100, 4, 2, 24), dtype)
    clean = run((q, k, v), "cpu", {})
    k[1, 700, 0] = torch.nan
    out = run((q, k, v), "cpu", {})
    hurt = torch.zeros(2, 2, 4, dtype=torch.bool)
    hurt[1, :, :2] = True
    assert torch.equal(out.isnan().all(-1), hurt) and torch.equal(out[~hurt], clean[~hurt])
    bias = torch.zeros(2, 1100)
    bias[1, 700] = -torch.inf
    assert run((q, k, v), "cpu", {"bias": bias}).isfinite().all()


@needs_cpu
@every_dtype
@pytest.mark.usefixtures("threads")
def test_the_same_every_time_in_any_company(dtype):
    inputs = cached((3, 2, 1500, 9, 3, 64), dtype)
    before, bias = torch.get_num_threads(), torch.zeros(3, 1500)
    bias[:, ::5] = -torch.inf
    expected = run(inputs, "cpu", {"bias": bias})
    try:
        for threads in (1, 2, 3, 7) * 5:
            torch.set_num_threads(threads)
            assert torch.equal(run(inputs, "cpu", {"bias": bias}), expected)
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        alone = [t[row : row + 1] for t in inputs]
        assert torch.equal(run(alone, "cpu", {"bias": bias[:1]}), expected[row : row + 1])
    wrong = []

    def many():
        for _ in range(30):
            if not torch.equal(run(inputs, "cpu", {"bias": bias}), expected):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=many) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_few_queries_go_the_direct_way(dtype, monkeypatch):
    for n, expected in ((1, "direct"), (64, "packed")):
        inputs, found = cached((1, n, 600, 4, 2, 64), dtype), {}
        for way in ("automatic", *PATHS):
            monkeypatch.setattr(cpu, "PATH", way)
            found[way] = run(inputs, "cpu", {})
        # Rounded to 16 bits, both ways may come out alike.
        assert dtype.itemsize < 4 or not torch.equal(found["packed"], found["direct"])
        assert torch.equal(found["automatic"], found[expected]), n


class Other(torch.Tensor):
    pass


def spied(monkeypatch):
    """What reaches the registered op: a list that grows."""
    seen, forward = [], op._bundle
    monkeypatch.setattr(op, "_bundle", lambda arguments: seen.append(1) or forward(arguments))
    return seen


@needs_cpu
def test_inference_goes_past_the_dispatcher(monkeypatch):
    seen, inputs = spied(monkeypatch), qkv((1, 1, 40, 4, 2, 16))
    plain = vf.grouped_attention(*inputs)
    with torch.no_grad():
        weights = [t.clone().requires_grad_() for t in inputs]
        assert torch.equal(vf.grouped_attention(*weights), plain)
    with torch.inference_mode():
        assert torch.equal(vf.grouped_attention(*inputs), plain)
    assert not seen and not plain.requires_grad
    through_op = torch.ops.variator.grouped_attention.default(*inputs, *(None,) * 7, 0, 0.25, "cpu")
    assert seen and torch.equal(through_op, plain)


@needs_cpu
def test_whoever_looks_on_still_sees_the_op(monkeypatch):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = qkv((1, 1, 40, 4, 2, 16))
    plain = vf.grouped_attention(*inputs)
    for mode in (Functions(), Dispatches()):
        called.clear()
        with mode:
            assert torch.equal(vf.grouped_attention(*inputs), plain)
        assert any("variator" in name for name in called), type(mode)
    with torch.profiler.profile() as profile:
        vf.grouped_attention(*inputs)
    assert any(event.name == "variator::grouped_attention" for event in profile.events())
    seen = spied(monkeypatch)
    for i in range(3):
        leaves = list(inputs)
        leaves[i] = leaves[i].clone().requires_grad_()
        vf.grouped_attention(*leaves).sum().backward()
        assert seen and leaves[i].grad is not None
        seen.clear()
    bias = torch.zeros(1, 40, requires_grad=True)
    vf.grouped_attention(*inputs, bias=bias).square().sum().backward()
    assert seen and bias.grad is not None


@needs_cpu
def test_tensors_that_are_not_their_memory():
    q, k, v = qkv((1, 1, 40, 4, 2, 16))
    expected = vf.grouped_attention(-q, k, v)
    negated = torch.complex(torch.zeros_like(q), q).conj().imag
    assert negated.is_neg()
    assert torch.equal(vf.grouped_attention(negated, k, v), expected)
    zeros = torch._efficientzerotensor(k.shape)
    nothing = vf.grouped_attention(q, zeros, v)
    assert torch.equal(nothing, vf.grouped_attention(q, torch.zeros_like(k), v))
    other = vf.grouped_attention((-q).as_subclass(Other), k, v)
    assert type(other) is Other and torch.equal(other.as_subclass(torch.Tensor), expected)
    rows = torch.vmap(lambda one: vf.grouped_attention(one, k, v))(torch.stack([-q, q]))
    torch.testing.assert_close(rows[0], expected)
    shapes = vf.grouped_attention(*(t.to("meta") for t in (q, k, v)))
    assert shapes.is_meta and shapes.shape == q.shape
    with torch.device("meta"):
        assert torch.equal(vf.grouped_attention(-q, k, v), expected)
