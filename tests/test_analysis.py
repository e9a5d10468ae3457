"""analysis: neurons counted against a loop over groups, by hand."""

import functools
import math

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.analysis import Activity, neurons

GATED = ("t5", "gated-gelu")


def inputs(model, *lengths, **settings):
    ids, mask = tiny.batch(*lengths, **settings)
    return {"input_ids": ids, "attention_mask": mask, **tiny.positions(model, mask)}


def ffn_inputs(model, batch):
    """What each FFN sublayer takes at the model's ratio."""
    caught = []

    def keep(run, x):
        caught.append(x)
        return run(x)

    name = "feed_forward_chunk" if hasattr(tiny.layers(model)[0], "intermediate") else "forward"
    for layer in tiny.layers(model):
        setattr(layer, name, functools.partial(keep, getattr(layer, name)))
    tiny.encoder(model)(**batch)
    for layer in tiny.layers(model):
        delattr(layer, name)
    return caught


def first_product(layer, h, threshold):
    """Pre-activations above the threshold, by the model's own modules."""
    seen = []
    act = next(m for n, m in layer.named_modules() if n.rpartition(".")[2] in ACTS)
    handle = act.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tiny.dense(layer, h)
    handle.remove()
    return seen[0] > threshold


ACTS = ("act", "activation", "intermediate_act_fn")


def by_hand(model, layer, x, mask, k, threshold):
    """The definitions, a group at a time."""
    counts = dict.fromkeys(Activity.__dataclass_fields__, 0) | {"neurons": 40}
    h = layer.layer_norm(x) if hasattr(layer, "layer_norm") else x
    for row, real in zip(h, mask.bool(), strict=True):
        row = row[real]
        active = first_product(layer, row, threshold)
        counts["tokens"] += len(row)
        counts["active"] += int(active.sum())
        for start in range(0, len(row) - k + 1, k):
            group = row[start : start + k]
            if k == 1:
                g = group[0]
            else:
                merge = layer.plugins[str(k)].merge
                scores = merge.weight @ group.flatten() + merge.bias
                g = scores.softmax(0) @ group
            c = first_product(layer, g, threshold)
            i, u = active[start : start + k].all(0), active[start : start + k].any(0)
            counts["groups"] += 1
            for name, found in (
                ("merged", c),
                ("intersection", i),
                ("union", u),
                ("merged_in_intersection", c & i),
                ("merged_in_union", c & u),
            ):
                counts[name] += int(found.sum())
    return Activity(**counts)


@pytest.mark.parametrize("variant", [("t5", "relu"), GATED, *tiny.BERT_VARIANTS])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@torch.no_grad()
def test_counts_are_the_definitions(variant, k, threshold):
    model = tiny.patched(*variant, ratio=k)
    batches = [inputs(model, 9, 4), inputs(model, 8, left=True, width=11), inputs(model, 3)]
    got = neurons(model, batches, k, threshold)
    expected = [Activity(40), Activity(40)]
    for batch in batches:
        for i, x in enumerate(ffn_inputs(model, batch)):
            layer, mask = tiny.layers(model)[i], batch["attention_mask"]
            expected[i] += by_hand(model, layer, x, mask, k, threshold)
    assert got == expected
    assert got[0].tokens == 9 + 4 + 8 + 3
    assert got[0].groups == {1: 24, 2: 4 + 2 + 4 + 1, 4: 2 + 1 + 2}[k]


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 4])
def test_kept_tokens_are_in_no_group(k):
    """The first two and all of id 5 stay whole: what is left between them forms groups."""
    model = tiny.patched(keep_first=2, keep=(5,), backend="reference")
    batch = inputs(model, 12, 7)
    ids = batch["input_ids"]
    ids[ids == 5] = 6
    ids[0, 7] = 5
    got = neurons(model, [batch], k)
    # Row 0: 2 kept, 5, 1 kept, 4; row 1: 2 kept, 5.
    assert got[0].groups == {1: 19, 2: 2 + 2 + 2, 4: 1 + 1 + 1}[k]
    assert got[0].tokens == 19
    vk.set_ratio(model, k)
    x = ffn_inputs(model, batch)[0]
    expected = Activity(40)
    runs = ((0, 0, 12), (1, 0, 7)) if k == 1 else ((0, 2, 7), (0, 8, 12), (1, 2, 7))
    for row, start, end in runs:
        run = x[row : row + 1, start:end]
        ones = torch.ones(1, end - start)
        expected += by_hand(model, tiny.layers(model)[0], run, ones, k, 0.0)
    for name in ("groups", "merged", "intersection", "union", "merged_in_intersection"):
        assert getattr(got[0], name) == getattr(expected, name)


def test_padding_does_not_count():
    model = tiny.patched("bert", "gelu")
    for left in (False, True):
        batch = inputs(model, 9, 4, left=left, width=13)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        rows = [{"input_ids": row[real][None]} for row, real in zip(ids, mask, strict=True)]
        assert neurons(model, [batch]) == neurons(model, rows)


def test_shares():
    activity = Activity(10, 8, 2, 16, 8, 2, 10, 1, 6)
    assert activity.shares() == {
        "token": 0.2,
        "merged": 0.4,
        "intersection": 0.1,
        "union": 0.5,
        "intersection_kept": 0.5,
        "union_kept": 0.6,
        "merged_in_intersection": 0.125,
        "merged_in_union": 0.75,
    }
    assert all(math.isnan(share) for share in Activity(10).shares().values())
    assert activity + activity == Activity(10, 16, 4, 32, 16, 4, 20, 2, 12)
    with pytest.raises(ValueError, match="other must have as many neurons, 10, got 11"):
        activity + Activity(11)


@pytest.mark.parametrize("variant", [("t5", "relu"), GATED, *tiny.BERT_VARIANTS])
@pytest.mark.parametrize("k", [2, 4])
def test_a_weighted_mean_lies_between_intersection_and_union(variant, k):
    model = tiny.patched(*variant)
    shares = sum(neurons(model, [inputs(model, 9, 4)], k)[1:], start=Activity(40)).shares()
    assert shares["intersection_kept"] == pytest.approx(1, abs=1e-3)
    assert shares["merged_in_union"] == pytest.approx(1, abs=1e-3)
    assert shares["intersection"] < shares["merged"] < shares["union"]


def test_at_ratio_one_every_token_is_its_group():
    model = tiny.patched()
    shares = neurons(model, [inputs(model, 9, 4)], ratio=1)[0].shares()
    assert shares["merged"] == shares["token"] == shares["union"] == shares["intersection"]
    assert shares["intersection_kept"] == shares["merged_in_union"] == 1


def test_the_model_is_left_as_it_was():
    model = tiny.patched()
    batch = inputs(model, 9, 4)
    expected = tiny.encode(model, batch["input_ids"], batch["attention_mask"])
    neurons(model, [batch], 2)
    assert tiny.encoder(model).variator_state.local.observer is None
    assert torch.equal(tiny.encode(model, batch["input_ids"], batch["attention_mask"]), expected)


def test_refuses_what_it_cannot_count():
    model = tiny.patched()
    batch = inputs(model, 9)
    with pytest.raises(ValueError, match="model is not patched"):
        neurons(tiny.model(), [batch])
    with pytest.raises(ValueError, match=r"ratio must be 1 \(dense\) or one that has plugins"):
        neurons(model, [batch], 8)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        neurons(model, [])
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        neurons(model, [batch], 4, float("nan"))
    with pytest.raises(ValueError, match="model must be in eval mode"):
        neurons(model.train(), [batch])
    model.eval()
    wo = tiny.layers(model)[1].DenseReluDense.wo
    wo.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match="FFN 1 is more than its weights"):
        neurons(model, [batch])
    assert tiny.encoder(model).variator_state.local.observer is None
    assert tiny.encoder(model).variator_state.current().uniform == 4


def test_works_while_the_model_runs_on_kernels_or_the_reference():
    batch = inputs(tiny.model(), 9, 4)
    counts = []
    for backend in ("auto", "reference"):
        model = vk.patch(tiny.model(), ratios=(4,), bottleneck=6, backend=backend)
        tiny.train_plugins(model)
        counts.append(neurons(model, [batch]))
    assert counts[0] == counts[1]
