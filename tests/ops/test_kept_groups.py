"""Groups around tokens that stay whole, against lists made by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.ops.cases import feed_forward, needs_cpu, plugin
from variator_kernels import functional as vf
from variator_kernels.ops.groups import Groups, Keep, slots
from variator_kernels.ops.make_groups import make_groups

FORMS = ["reference", pytest.param("cpu", marks=needs_cpu), "triton"]
"""In which backends' form: plain PyTorch, one call, and that of a GPU."""


def by_hand(real, keep, k, first, last):
    """The groups of one row: tokens and whether they are kept; those without a token left out."""
    tokens = [i for i, is_real in enumerate(real) if is_real]
    kept = {i for i in tokens if keep[i]} | set(tokens[:first])
    kept |= set(tokens[max(len(tokens) - last, 0) :])
    found, run = [], []

    def cut():
        starts = range(run[0], run[-1] + 1, k) if run else ()
        found.extend(([i for i in run if at <= i < at + k], False) for at in starts)
        run.clear()

    for i in tokens:
        if i in kept:
            cut()
            found.append(([i], True))
        else:
            run.append(i)
    cut()
    return [group for group in found if group[0]]


def listed(groups: Groups):
    """What :func:`by_hand` gives, of all rows."""
    index, exists = slots(groups)
    flat = zip(index.flatten(0, -2), exists.flatten(0, -2), groups.kept.flatten(), strict=True)
    found = [(i[e].tolist(), bool(kept)) for i, e, kept in flat]
    assert not any(kept for tokens, kept in found if not tokens)
    return [group for group in found if group[0]]


def owned(groups: Groups):
    """Every token that a GPU's slots write."""
    pairs = zip(groups.start.flatten().tolist(), groups.owned.flatten().tolist(), strict=True)
    assert ((groups.span <= groups.owned) & (groups.owned <= groups.ratio)).all()
    return sorted(start + j for start, size in pairs for j in range(size))


LENGTHS = st.lists(st.integers(0, 17), min_size=0, max_size=4)
KEEPS = st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([None, 0.2, 1.0]))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 3),
    n=st.integers(0, 17),
    k=st.sampled_from([2, 3, 4, 8, 32]),
    kept=KEEPS,
    real=st.sampled_from([None, 0.2, 0.8]),
    seed=st.integers(0, 1000),
)
def test_batches(form, rows, n, k, kept, real, seed):
    torch.manual_seed(seed)
    first, last, share = kept
    keep = None if share is None else torch.rand(rows, n) < share
    if first == last == 0 and keep is None:
        first = 1
    mask = None if real is None else torch.rand(rows, n) < real
    x = torch.empty(rows, n, 1)
    groups = make_groups(x, k, mask=mask, keep=Keep(first, last, keep), backend=form)
    shape = torch.ones(rows, n), torch.zeros(rows, n)
    wanted = []
    for i in range(rows):
        is_real, is_kept = ((m[i] if m is not None else s[i]).tolist() for m, s in
                            zip((mask, keep), shape, strict=True))  # fmt: skip
        row = by_hand(is_real, is_kept, k, first, last)
        wanted += [([i * n + token for token in tokens], whole) for tokens, whole in row]
    assert listed(groups) == wanted
    if form == "triton":
        assert owned(groups) == list(range(rows * n))
    if form == "cpu" and n and rows and real is None:
        assert groups.start.shape[1] == max(len(wanted) // rows, (groups.span > 0).sum(1).max())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    around=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    k=st.sampled_from([2, 3, 4, 8, 32]),
    kept=KEEPS,
    seed=st.integers(0, 1000),
)
def test_varlen(form, lengths, around, k, kept, seed):
    torch.manual_seed(seed)
    first, last, share = kept
    offsets = torch.tensor([around[0], *lengths]).cumsum(0)
    tokens = int(offsets[-1]) + around[1]
    keep = None if share is None else torch.rand(tokens) < share
    if first == last == 0 and keep is None:
        first = 1
    x = torch.empty(tokens, 1)
    groups = make_groups(x, k, cu_seqlens=offsets, keep=Keep(first, last, keep), backend=form)
    wanted = []
    for at, length in zip(offsets.tolist(), lengths, strict=False):
        is_kept = [False] * length if keep is None else keep[at : at + length].tolist()
        row = by_hand([True] * length, is_kept, k, first, last)
        wanted += [([at + token for token in tokens], whole) for tokens, whole in row]
    assert listed(groups) == wanted
    if form == "triton":
        assert owned(groups) == list(range(tokens)) and groups.span[-1] == groups.owned[-1] == 0


@pytest.mark.parametrize("form", FORMS[:2])
def test_no_more_groups_than_there_can_be(form):
    x = torch.empty(8, 512, 1)
    assert make_groups(x, 4, keep=Keep(1), backend=form).shape(x) == (8, 129)
    assert make_groups(x, 4, keep=Keep(2, 1), backend=form).shape(x) == (8, 131)
    assert make_groups(x, 4, keep=Keep(10**9), backend=form).shape(x) == (8, 512)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 9, dtype=torch.bool)])
def test_no_more_memory_than_tokens_ask_for(mask):
    """However many tokens are to be kept: there are no more than a row has."""
    x, keep = torch.empty(2, 9, 1), Keep(10**9, 10**9)
    assert make_groups(x, 4, mask=mask, keep=keep, backend="triton").start.shape[1] <= 18
    packed = make_groups(x[0], 4, cu_seqlens=torch.tensor([0, 9]), keep=keep, backend="triton")
    assert packed.start.shape[0] <= 12


@needs_cpu
def test_the_cpu_has_as_many_groups_as_the_fullest_row():
    x, keep = torch.empty(2, 12, 1), torch.zeros(2, 12, dtype=torch.bool)
    keep[1, 5] = True
    assert make_groups(x, 4, keep=Keep(mask=keep)).shape(x) == (2, 12)
    assert make_groups(x, 4, keep=Keep(mask=keep), backend="cpu").shape(x) == (2, 5)


def test_a_mask_of_numbers_counts_as_one_of_truth_values():
    x, keep = torch.empty(2, 9, 1), (torch.rand(2, 9) < 0.3)
    whole = make_groups(x, 4, keep=Keep(mask=keep))
    assert torch.equal(make_groups(x, 4, keep=Keep(mask=keep.long() * 7)).start, whole.start)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_first": -1}, ValueError, "keep_first must be >= 0 and < 2.31, got -1"),
        ({"keep_last": -2}, ValueError, "keep_last must be >= 0 and < 2.31, got -2"),
        ({"keep_first": 2**70}, ValueError, "keep_first must be >= 0 and < 2.31, got 1180"),
        ({"keep_first": 1.0}, TypeError, "keep_first must be an integer, got 1.0"),
        ({"keep_last": True}, TypeError, "keep_last must be an integer, got True"),
        ({"keep": [1, 0]}, TypeError, "keep must be a torch.Tensor, got list"),
        ({"keep": torch.ones(2, 8)}, ValueError, r"keep must have shape \[2, 9\], got \[2, 8\]"),
        ({"keep": -torch.ones(2, 9)}, ValueError, "keep must be nonzero for a"),
        ({"keep": torch.ones(2, 9, device="meta")}, ValueError, "keep must be on x's device"),
    ],
)
def test_what_is_kept_is_checked(options, error, message):
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    with pytest.raises(error, match=message):
        vf.compressed_ffn(torch.randn(2, 9, 24), p, ffn, **options)


@needs_cpu
@pytest.mark.parametrize("kept", [torch.ones(1, 3), torch.ones(1, 2, dtype=torch.bool)])
def test_kept_flags_that_do_not_fit_are_refused(kept):
    """The kernels read them by address."""
    x = torch.randn(1, 9, 24)
    p, ffn = plugin(24, 4, 8, torch.float32), feed_forward(24, 40, torch.float32, "t5")
    from variator_kernels.ops.compressed_ffn import op

    groups = make_groups(x, 4, backend="cpu")._replace(kept=kept)
    with pytest.raises(ValueError, match="kept"):
        op.compressed_ffn(x, p, ffn, groups, "cpu")
