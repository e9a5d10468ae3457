"""Groups are data: what is made of masks and offsets, and what ops make of any."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    cast,
    feed_forward,
    masked,
    needs_cpu,
    plugin,
)
from variator_kernels import functional as vf
from variator_kernels.ops import make_groups as groups_module
from variator_kernels.ops.compressed_ffn import op as ffn_op
from variator_kernels.ops.compressed_ffn import reference as ffn_reference
from variator_kernels.ops.feed_forward import normalize, products
from variator_kernels.ops.groups import Groups, real_tokens, slots, token_slots
from variator_kernels.ops.make_groups import make_groups

D = 24
FFN = feed_forward(D, 40, torch.float32, "t5")


def by_hand(mask, k):
    """Lists of the tokens of each slot (None: empty), row by row."""
    found = []
    for i, row in enumerate(mask.tolist()):
        real = [j for j, is_real in enumerate(row) if is_real]
        spans = range(real[0], real[-1] + 1, k) if real else ()
        for at in spans:
            inside = range(at, min(at + k, real[-1] + 1))
            tokens = [i * len(row) + j if row[j] else None for j in inside]
            found.append(tokens + [None] * (k - len(tokens)))
    return found


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes", "empty row"])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 19, 24])
def test_slots_are_those_of_the_specification(kind, k, n):
    x = torch.randn(3, n, D)
    mask = masked(kind, 3, n)
    groups = make_groups(x, k, mask=mask)
    assert groups.shape(x) == (3, -(-n // k)) == tuple(groups.start.shape)
    index, exists = slots(groups)
    got = [
        [token if there else None for token, there in zip(*group, strict=True)]
        for group in zip(index.flatten(0, 1).tolist(), exists.flatten(0, 1).tolist(), strict=True)
    ]
    whole = torch.ones(3, n, dtype=torch.bool) if mask is None else mask
    empty = [None] * k
    assert [g for g in got if g != empty] == [g for g in by_hand(whole, k) if g != empty]
    slot, real = token_slots(groups, 3 * n)
    assert torch.equal(real.view(3, n), whole)
    assert torch.equal(index.flatten()[slot][real], torch.arange(3 * n)[real])
    assert (real_tokens(groups, x) is None) == (mask is None)


def test_varlen_means_the_same_as_a_batch():
    lengths = [5, 0, 9, 1]
    offsets = torch.tensor([2, 7, 7, 16, 17])
    x = torch.randn(20, D)
    groups = make_groups(x, 4, cu_seqlens=offsets)
    index, exists = slots(groups)
    got = [i[e].tolist() for i, e in zip(index, exists, strict=True) if e.any()]
    wanted = [
        list(range(at, min(at + 4, first + length)))
        for first, length in zip(offsets.tolist(), lengths, strict=False)
        for at in range(first, first + length, 4)
    ]
    assert got == wanted
    real = real_tokens(groups, x)
    assert real.tolist() == [2 <= i < 17 for i in range(20)]


@needs_cpu
@pytest.mark.parametrize(
    ("start", "span"),
    [
        ([-1, 4], [4, 4]),
        ([0, 8], [4, 4]),
        ([0, 4], [4, 5]),
        ([0, 4], [4, -1]),
        ([0, 3], [4, 4]),
        ([4, 0], [4, 4]),
    ],
)
def test_groups_outside_of_the_tokens_are_refused(start, span):
    """The kernels would read and write the memory of others."""
    x = torch.randn(1, 11, D)
    groups = make_groups(x, 4)._replace(start=torch.tensor([start]), span=torch.tensor([span]))
    with pytest.raises(ValueError, match="groups must lie within the tokens"):
        ffn_op.compressed_ffn(x, plugin(D, 4, 8, torch.float32), FFN, groups, "cpu")


@needs_cpu
def test_tokens_of_no_group_pass_through():
    """Nothing of an output is left unwritten, whatever the groups say."""
    x, p = torch.randn(1, 11, D), plugin(D, 4, 8, torch.float32)
    groups = make_groups(x[:, :7], 4)
    y = ffn_op.compressed_ffn(x, p, FFN, groups, "cpu")
    assert torch.equal(y[:, 7:], x[:, 7:])
    torch.testing.assert_close(y[:, :7], vf.compressed_ffn(x[:, :7], p, FFN, backend="reference"))


@needs_cpu
def test_lists_of_a_mask_are_those_of_plain_pytorch():
    for kind in ("right", "left", "holes", "empty row"):
        for n in (1, 5, 24):
            mask = masked(kind, 3, n)
            for k in (2, 3, 8):
                ours = make_groups(torch.empty(3, n, 1), k, mask=mask, backend="cpu")
                plain = make_groups(torch.empty(3, n, 1), k, mask=mask)
                held = plain.span > 0
                assert torch.equal(ours.span, plain.span)
                assert torch.equal(ours.start[held], plain.start[held])


@needs_cpu
def test_modes_and_transforms_get_no_addresses():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, mask = torch.randn(2, 9, D), masked("holes", 2, 9)
    meta = make_groups(x.to("meta"), 3, mask=mask.to("meta"), backend="cpu")
    assert meta.start.is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_groups(x, 3, mask=mask, backend="cpu")
    with torch.device("meta"):
        assert not make_groups(x, 3, mask=mask, backend="cpu").start.is_inference()
    spans = torch.vmap(lambda m: make_groups(x, 3, mask=m, backend="cpu").span)(mask[:, None])
    assert torch.equal(spans[:, 0], make_groups(x, 3, mask=mask).span)


def test_lists_of_full_batches_are_made_once_and_never_by_a_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(2, 77, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_groups(x, 5)
    groups = make_groups(x, 5)
    assert type(groups.start) is torch.Tensor and not groups.start.is_inference()
    with torch.inference_mode():
        assert make_groups(x, 5).start is groups.start
        other = make_groups(torch.randn(2, 78, 3), 5)
    assert not other.start.is_inference()
    for n in range(200):
        make_groups(torch.empty(1, n, 1), 2)
    assert len(groups_module._PLAIN) <= groups_module._MOST_PLAIN


UNEQUAL = Groups(
    torch.tensor([[0, 1, 5, 7]]),
    torch.tensor([[1, 4, 2, 2]]),
    None,
    torch.tensor([[True, False, False, False]]),
    None,
    4,
    "listed",
)


def test_kept_tokens_and_groups_of_unequal_size():
    """In the reference a kept token is the dense sublayer's, every other group stands alone."""
    x, p = torch.randn(1, 9, D, dtype=torch.double), plugin(D, 4, 8, torch.double)
    ffn = cast(FFN, torch.double)
    y = ffn_reference.compressed_ffn(x, p, ffn, UNEQUAL)
    dense = x + products(normalize(x, ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps), ffn)
    torch.testing.assert_close(y[:, :1], dense[:, :1], rtol=0, atol=1e-12)
    for first, size in zip(UNEQUAL.start[0, 1:], UNEQUAL.span[0, 1:], strict=True):
        part = x[:, first : first + size]
        alone = vf.compressed_ffn(part, p, ffn, backend="reference")
        torch.testing.assert_close(y[:, first : first + size], alone, rtol=0, atol=1e-12)


@needs_cpu
@pytest.mark.parametrize("kept", [None, UNEQUAL.kept])
def test_the_cpu_kernels_take_groups_of_unequal_size(kept):
    x, p = torch.randn(1, 9, D), plugin(D, 4, 8, torch.float32)
    groups = UNEQUAL._replace(kept=kept)
    expected = ffn_reference.compressed_ffn(x, p, FFN, groups)
    torch.testing.assert_close(ffn_op.compressed_ffn(x, p, FFN, groups, "cpu"), expected)
