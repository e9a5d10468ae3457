"""Self-attention in one call of the extension gives, bit for bit, what it gives in steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.sublayers import DTYPES, PRECISIONS, D, inputs, same
from variator_kernels.ops import dense, prepack
from variator_kernels.ops.arguments import MergeWeights
from variator_kernels.ops.groups import Groups, real_tokens
from variator_kernels.ops.self_attention import (
    SelfAttention,
    Table,
    Terms,
    fused,
    members,
    plain_keys,
    whole,
    whole_queries,
)

pytestmark = [cases.needs_cpu, pytest.mark.usefixtures("own_products", "own_norms")]
HEADS, KV_HEADS, SIZE = 6, 2, 8
KINDS = ["none", "right", "holes", "empty row", "kept", "strided", "NaN", "nothing"]


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def sublayer(
    dtype: torch.dtype, norm: str, post: bool, kv_heads: int = KV_HEADS, residual: bool = True
) -> SelfAttention:
    q, k = HEADS * SIZE, kv_heads * SIZE
    return SelfAttention(
        random(dtype, q, D),
        random(dtype, k, D),
        random(dtype, k, D),
        random(dtype, D, q),
        SIZE,
        SIZE**-0.5,
        random(dtype, 1, q)[0],
        None if post else random(dtype, 1, k)[0],
        None,
        random(dtype, 1, D)[0],
        norm=norm,
        norm_weight=None if norm == "none" else (1 + random(dtype, 1, D)[0]).to(dtype),
        norm_bias=random(dtype, 1, D)[0] if norm == "layer" else None,
        post_norm=post and norm != "none",
        residual=residual,
    )


def terms_of(number: int) -> Terms:
    table = Table(torch.randn(16, HEADS), 20)
    return [Terms(), Terms(table), Terms(window=(2, 3)), Terms(table, (4, 1))][number % 4]


def merge_of(dtype: torch.dtype, ratio: int) -> MergeWeights:
    return MergeWeights(random(dtype, ratio, ratio * D), random(dtype, 1, ratio)[0])


def merged(x: Tensor, a: SelfAttention, merge: MergeWeights, groups: Groups, terms: Terms):
    keys = whole_queries(members(groups, x), x, terms)
    return fused.merged_keys(x, merge, groups, a, keys, None)


def both(monkeypatch, run, *arguments) -> tuple[Tensor, Tensor]:
    """At once, and in steps."""
    with monkeypatch.context() as patched:
        patched.setattr(fused, "_attend", None)
        found = [run(*arguments) for _ in range(2)]  # packed, and found
    assert same(*found)
    with monkeypatch.context() as patched:
        patched.setattr(fused, "at_once", lambda *_: None)
        return found[0], run(*arguments)


@pytest.mark.parametrize("isa", cases.INT8_ISAS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind(monkeypatch, dtype, precision, isa):
    cases.CPU.set_isa(isa)
    norms = itertools.product(("none", "rms", "layer"), (False, True))
    for (number, (norm, post)), kind in itertools.product(enumerate(norms), KINDS):
        torch.set_num_threads(1 + number % 2)
        kv_heads = (KV_HEADS, HEADS)[number % 2]
        residual = (number + KINDS.index(kind)) % 3 > 0
        a = sublayer(dtype, norm, post, kv_heads, residual)._replace(precision=precision)
        ratio = (4, 2, 16)[number % 3]
        x, groups = inputs(dtype, kind, ratio)
        terms = terms_of(number + KINDS.index(kind))
        arguments = x, a, merge_of(dtype, ratio), groups, terms
        found, expected = both(monkeypatch, merged, *arguments)
        assert same(found, expected), ("merged", norm, post, kind)
        keys = plain_keys(x, real_tokens(groups, x), terms)
        found, expected = both(monkeypatch, fused.dense, x, a, keys, None)
        assert same(found, expected), ("dense", norm, post, kind)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_in_pieces(monkeypatch, precision):
    monkeypatch.setattr(fused, "PIECE", 40)
    a = sublayer(torch.float32, "rms", False)._replace(precision=precision)
    x, groups = inputs(torch.float32, "right", 4)
    keys = plain_keys(x, real_tokens(groups, x), terms_of(3))
    assert same(*both(monkeypatch, fused.dense, x, a, keys, None))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_write_to_any_source_is_noticed(monkeypatch, precision, post):
    a = sublayer(torch.float32, "layer", post)._replace(precision=precision)
    x, groups = inputs(torch.float32, "right", 4)
    merge, terms = merge_of(torch.float32, 4), Terms()
    before, _ = both(monkeypatch, merged, x, a, merge, groups, terms)
    sources = (*a[:4], a.b_q, a.b_o, a.norm_weight, a.norm_bias, *merge[:2])
    for source in sources:
        source.data.view(-1)[0] += 0.25
        found, expected = both(monkeypatch, merged, x, a, merge, groups, terms)
        assert same(found, expected) and not same(found, before)
        before = found


@pytest.mark.skipif(len(cases.INT8_ISAS) < 2, reason="one instruction set is not switched")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call_uses_one_instruction_set(monkeypatch, dtype, precision):
    a = sublayer(dtype, "rms", False)._replace(precision=precision)
    ffn = cases.feed_forward(D, 72, dtype, "t5")._replace(precision=precision)
    x, groups = inputs(dtype, "right", 4)
    merge, keys = merge_of(dtype, 4), plain_keys(x, None, Terms())

    def calls() -> list[Tensor]:
        return [
            fused.dense(x, a, keys, None),
            merged(x, a, merge, groups, Terms()),
            dense.feed_forward(x, ffn),
        ]

    expected = []
    for isa in cases.INT8_ISAS:
        cases.CPU.set_isa(isa)
        expected.append(calls())
    get = prepack.cache.get

    def get_and_switch(*arguments):
        found = get(*arguments)
        at = cases.INT8_ISAS.index(cases.CPU.active_isa())
        cases.CPU.set_isa(cases.INT8_ISAS[(at + 1) % len(cases.INT8_ISAS)])
        return found

    monkeypatch.setattr(prepack.cache, "get", get_and_switch)
    prepack.cache.forget((*a[:4], *ffn[:2], *merge[:2]))
    for _ in cases.INT8_ISAS:
        for i, found in enumerate(calls()):
            assert any(same(found, each[i]) for each in expected), i


def test_where_it_runs_in_steps():
    a = sublayer(torch.float32, "none", False)._replace(precision="int8")
    x, _ = inputs(torch.float32, "none", 4)
    keys = plain_keys(x, None, Terms())
    assert whole.at_once(x, a, keys) is not None
    assert whole.at_once(x, a._replace(q_norm=torch.nn.Identity()), keys) is None
    with torch.profiler.profile():  # it shows the op
        assert whole.at_once(x, a, keys) is None
    a.w_k[0, 0] = torch.nan
    assert whole.at_once(x, a, keys) is None
    with pytest.raises(ValueError, match="rows, keys"):
        whole.at_once(x, a._replace(w_k=a.w_v), keys._replace(bias=torch.zeros(3, 36)))
