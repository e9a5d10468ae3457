"""Which neurons stay, and how a share of the parameters is divided: the best that was tried."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch

import variator_kernels as vk
from tests.projected import cases
from variator_kernels.methods.projected import search, sizes
from variator_kernels.methods.projected.composition import composition_of
from variator_kernels.methods.projected.neurons import survivors
from variator_kernels.sites.layout import layout_of

SHARE = 0.5


def lost(moments: torch.Tensor, weight: torch.Tensor, kept) -> float:
    """Of the output's second moment, when kept columns make up for all others: by definition."""
    kept = torch.as_tensor(kept)
    best = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ weight.mT).mT
    apart = weight.clone()
    apart[:, kept] -= best
    return float(((apart @ moments) * apart).sum())


def problem(seed: int, f: int = 8):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(f, f, generator=generator, dtype=torch.float64)
    x = torch.randn(400, f, generator=generator, dtype=torch.float64) @ mixed
    return x.mT @ x, torch.randn(3, f, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_neuron_goes_first(seed):
    moments, weight = problem(seed)
    found = survivors(moments, weight, 7)
    every = {kept: lost(moments, weight, kept) for kept in itertools.combinations(range(8), 7)}
    assert lost(moments, weight, found) == pytest.approx(min(every.values()))


def test_survivors_beat_most_choices():
    """Greedy: not always the best of all 70, but nearer to it than the cheapest at first sight."""
    places, at_once = [], []
    for seed in range(12):
        moments, weight = problem(seed)
        every = sorted(lost(moments, weight, kept) for kept in itertools.combinations(range(8), 4))
        first = weight.square().sum(0) / torch.linalg.inv(moments).diagonal()
        for found, kept in ((places, survivors(moments, weight, 4)), (at_once, first.topk(4)[1])):
            mine = lost(moments, weight, kept)
            found.append(sum(value < mine * (1 - 1e-9) for value in every))
    assert sum(places) / 12 < 2 < sum(at_once) / 12, (places, at_once)


@pytest.mark.parametrize("f", [100, 128, 256])
def test_one_of_two_that_say_the_same_stays(f):
    """Where several go before all is looked at again, too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * f, f, generator=generator, dtype=torch.float64)
    x[:, 1] = x[:, 0]
    weight = torch.randn(5, f, generator=generator, dtype=torch.float64)
    weight[:, :2] *= 5
    kept = survivors(x.mT @ x, weight, f - f // 8).tolist()
    assert len({0, 1} & set(kept)) == 1


def test_a_neuron_that_others_say_goes():
    """The largest activation is worth nothing where two others add up to it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 4] = 5 * (x[:, 0] + x[:, 1])
    weight = torch.ones(3, 6, dtype=torch.float64)
    kept = survivors(x.mT @ x, weight, 5).tolist()
    assert len({0, 1, 4} & set(kept)) == 2


def test_neurons_that_never_fire():
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2:4] = 0
    kept = survivors(x.mT @ x, torch.ones(2, 6, dtype=torch.float64), 4)
    assert kept.tolist() == [0, 1, 4, 5]
    assert len(survivors(torch.zeros(6, 6).double(), torch.ones(2, 6).double(), 3)) == 3


@pytest.mark.parametrize("name", ["llama", "t5-gated-gelu", "bert"])
def test_less_is_lost_than_with_the_largest_activations(name):
    """Of the first FFN's output, when the others make up for those that go."""
    model = cases.model(name)
    given = [cases.batch(model, seed) for seed in range(20)]
    layout = layout_of(model)
    part = next(part for part in layout.sublayers if part.inner)
    weight = model.get_submodule(part.writes).weight.detach()
    reads = cases.reads(model, part.writes, given)
    losses = {}
    for kind in ("output", "gated" if layout.gated else "activation"):
        small = vk.project(model, given, ffn=16, importance=kind)
        kept = composition_of(small.get_submodule(part.reads[0])).p_out.argmax(1)
        losses[kind] = lost(reads.mT @ reads, weight, kept)
    chosen, largest = losses.values()
    assert 0 < chosen < 0.95 * largest


def tried(model, given, caplog, share=SHARE, **settings):
    """The small model, and the divergence of each way by its sizes and head."""
    with caplog.at_level(logging.INFO, logger="variator_kernels"):
        small = vk.project(model, given, share, **settings)
    lines = [r for r in caplog.records if "from the original" in r.msg]
    return small, {(*record.args[:2], record.args[2] != ""): record.args[3] for record in lines}


@pytest.mark.parametrize("name", ["llama", "gemma", "t5-relu"])
@pytest.mark.parametrize("start", ["pca", "select"])
def test_the_way_that_diverges_least(name, start, caplog):
    model = cases.model(name)
    given = [cases.batch(model, seed) for seed in range(6)]
    small, ways = tried(model, given, caplog, start=start, split="search")
    made = small.variator_projection
    best = min(ways, key=lambda way: ways[way])
    assert len(ways) >= 3 and len({way[0] for way in ways}) >= 3
    assert (made.sizes.hidden, made.sizes.ffn) == best[:2]
    assert made.untied == best[2] and made.share <= SHARE
    # Made anew with all batches: as if these sizes had been asked for.
    again = vk.project(model, given, hidden=best[0], ffn=best[1], start=start,
                       **({"untie": best[2]} if layout_of(model).tied else {}))  # fmt: skip
    inputs = cases.batch(model, 9)
    assert torch.equal(cases.output(small, inputs), cases.output(again, inputs))


def test_a_head_that_must_stay_tied(caplog):
    model = cases.model("gemma")
    small, ways = tried(model, [cases.batch(model, n) for n in range(3)], caplog, untie=False)
    assert ways and not small.variator_projection.untied and not any(way[2] for way in ways)


def test_one_width_is_nothing_to_search(caplog):
    model = cases.model("bert")
    _, ways = tried(model, [cases.batch(model)], caplog, 0.8)
    assert not ways


def numbers(pieces) -> list[int]:
    """Which rows they hold, of batches that are filled with these."""
    return [int(n) for piece in pieces for n in piece["input_ids"][:, 0]]


@pytest.mark.parametrize(
    "batches, rows, length, fitted, held_out",
    [
        (6, 4, 500, 8, 4),  # pieces of two rows, so 4000 and 1000 tokens and the next piece
        (32, 1, 32, 24, 8),  # few tokens: a quarter of them
        (1, 32, 16, 32, 32),  # one piece
        (1, 8, 512, 6, 2),  # one batch, cut
        (2, 1, 512, 1, 1),
        (3, 1, 9000, 1, 1),
    ],
)
def test_tries_see_other_tokens_than_those_that_judge_them(batches, rows, length, fitted, held_out):
    every = torch.arange(batches * rows)[:, None].expand(-1, length)
    given = [{"input_ids": some, "attention_mask": torch.ones_like(some),
              "position_ids": torch.zeros(1, length), "labels": torch.zeros(rows),
              "cache_position": torch.arange(rows)} for some in every.split(rows)]  # fmt: skip
    fit, judge = search._divided(given)
    assert abs(len(numbers(fit)) - fitted) <= 2 and abs(len(numbers(judge)) - held_out) <= 2
    assert (len(numbers(fit)) + len(numbers(judge)) <= batches * rows) or batches * rows == 32
    if batches > 1 or length > 100:
        assert not set(numbers(fit)) & set(numbers(judge))
    for piece in (*fit, *judge):
        count = len(piece["input_ids"])
        assert len(piece["labels"]) == len(piece["attention_mask"]) == count
        assert piece["position_ids"].shape == (1, length) and len(piece["cache_position"]) == rows


def test_rows_without_a_real_token_judge_nothing():
    ids = torch.arange(12)[:, None].expand(-1, 512)
    given = {"input_ids": ids, "attention_mask": (ids < 4).long(), "labels": ids.clone()}
    given["labels"][:2] = search.IGNORED
    assert {*numbers(search._pieces(given))} == {2, 3}


def test_models_without_a_head(caplog):
    """They have no distributions to compare."""
    model = cases.model("llama").model
    small, ways = tried(model, [cases.batch(cases.model("llama"))], caplog)
    assert not ways and small.config.hidden_size < model.config.hidden_size


def test_ways_that_are_not_finite(monkeypatch):
    model = cases.model("gemma")
    given = [cases.batch(model, seed) for seed in range(3)]
    real, made = search._divergence, []

    def once(ours, theirs):
        made.append(ours)
        return real(ours, theirs) if len(made) == 3 else math.nan

    monkeypatch.setattr(search, "_divergence", once)
    assert vk.project(model, given, SHARE).variator_projection.share <= SHARE and len(made) >= 3
    monkeypatch.setattr(search, "_divergence", lambda ours, theirs: math.inf)
    with pytest.raises(FloatingPointError, match="outputs on batches are not finite"):
        vk.project(model, given, SHARE)


def test_classifiers_are_searched_too(caplog):
    import transformers

    config = cases.model("llama").config
    for labels in (1, 3):
        config.num_labels, config.pad_token_id = labels, 0
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(config).double().eval()
        given = [dict(cases.batch(cases.model("llama"), seed)) for seed in range(4)]
        for batch in given:
            batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
        caplog.clear()
        _, ways = tried(model, given, caplog)
        assert len(ways) > 1 and min(ways.values()) > 0


def test_batches_that_ask_for_tuples():
    model = cases.model("t5-relu")
    given = [cases.batch(model, seed) | {"return_dict": False} for seed in range(3)]
    assert vk.project(model, given, SHARE).variator_projection.share <= SHARE


def test_the_whole_model_is_no_smaller():
    model = cases.model("gemma")
    for split in ("alike", "search"):
        made = vk.project(model, [cases.batch(model)], 1.0, split=split).variator_projection
        assert made.share == 1.0 and not made.untied


def test_ways_to_divide_a_share():
    model = cases.model("llama", tie_word_embeddings=True)
    layout = layout_of(model)
    own = sizes.sizes_of(model, layout)
    for untied in (False, True):
        found = sizes.splits(model, layout, SHARE, untied, 5)
        assert 2 <= len(found) <= 5 and found == sorted(found, reverse=True)
        shares = [sizes.parameters(model, layout, s, untied) for s in found]
        whole = sizes.parameters(model, layout, own)
        assert all(SHARE - sizes.NEAR <= n / whole <= SHARE for n in shares)
        assert not untied or found[0].hidden < own.hidden


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"params": 0.5, "split": "best"}, r"one of \('alike', 'search'\), got 'best'"),
        ({"hidden": 16, "split": "search"}, "params must be given for split to divide"),
        ({"params": 0.5, "start": "select", "importance": "output"}, "where no other neuron"),
        ({"params": 0.5, "start": "select", "importance": "weight", "split": "search"},
         "batches must be given"),
    ],
)  # fmt: skip
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        vk.project(cases.model("llama"), **settings)
