"""Training decoders: what a row of prompt and answer means, and what may be asked of it."""

import copy
import math

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DynamicCache

import variator_kernels as vk
from tests.decoders import tiny
from tests.train import toy
from variator_kernels.train import DistillationConfig, DistillationTrainer, checkpoints, decoders
from variator_kernels.train.losses import IGNORED

BOTH = {"ffn": {1: 2, 2: 4}, "attention_kv": 3}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LEVELS = [{"attention_kv": 3}, {"ffn": 2}, {"ffn": 4, "attention_kv": 2}]


def batch(prompts, answers, side="right", seed=0):
    """Rows of random tokens; those of the answers have labels."""
    lengths = [p + a for p, a in zip(prompts, answers, strict=True)]
    ids, mask, _ = tiny.padded(lengths, side, seed)
    place = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    labels = torch.where(place >= torch.tensor(prompts)[:, None], ids, IGNORED)
    labels[(mask == 0) | (place == 0)] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(number=8, prompt=17, answer=6):
    made = batch([prompt + i % 4 for i in range(number)], [answer] * number)
    return [
        {key: value[real].tolist() for key, value in one.items() if key != "attention_mask"}
        for one in ({k: v[i] for k, v in made.items()} for i in range(number))
        for real in [one["attention_mask"] > 0]
    ]


def model(level=None, dtype=torch.float32, **settings):
    """Its plugins are no initial ones."""
    given = {"window": 5, "keep_first": 2} | settings
    return tiny.patched(ratio=level or BOTH, dtype=dtype, **given).to(dtype)


def trainer(folder, made=None, train=None, **settings):
    given = {"per_device_train_batch_size": 4, "max_steps": 6, "warmup_steps": 0}
    given |= {"logits_weight": 1.0, "layer_weight": 1.0, "learning_rate": 1e-2}
    config = DistillationConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_steps=2, **given | settings
    )
    return DistillationTrainer(
        made or model(),
        config,
        train_dataset=train or rows(),
        eval_dataset=train or rows(),
        data_collator=DataCollatorForSeq2Seq(toy.tokenizer()),
    )


def objective(made, **settings):
    args = DistillationConfig(
        output_dir="unused", use_cpu=True, **{"logits_weight": 1.0} | settings
    )
    return decoders.DecoderObjective(made, args)


def states_of(made, given):
    """The last hidden states of the student, as training makes them."""
    (state,) = vk.runtime.state.states(made)
    with torch.no_grad():
        return objective(made).student(made, given, state.level).hidden_states[-1]


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [{}, {"keep_last": 3}, {"keep": (7, 11, 20, 31)}], ids=str)
@torch.no_grad()
def test_a_row_is_a_prompt_that_was_prefilled_and_an_answer_that_was_decoded(level, side, kept):
    made = model(level, torch.float64, **kept)
    prompts, answers = [17, 18, 19, 20, 4, 3, 2, 25], [6, 1, 7, 5, 3, 8, 9, 2]
    given = batch(prompts, answers, side)
    got = states_of(made, given)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = given["input_ids"][row][given["attention_mask"][row] > 0][None]
        cache, found = DynamicCache(), []
        for part in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            out = made(part, past_key_values=cache, output_hidden_states=True)
            found.append(out.hidden_states[-1])
        own = got[row][given["attention_mask"][row] > 0]
        torch.testing.assert_close(own, torch.cat(found, 1)[0], rtol=1e-9, atol=1e-9)
        assert own.shape == (prompt + answer, tiny.D)


@pytest.mark.parametrize("level", [*LEVELS, BOTH], ids=str)
@pytest.mark.parametrize("prompt", [13, 14, 15, 16])
@torch.no_grad()
def test_no_counted_prediction_knows_a_later_token(level, prompt):
    made = model(level, torch.float64)
    given = batch([prompt], [8])
    plain = states_of(made, given)
    counted = (given["labels"][0, 1:] != IGNORED).nonzero()[:, 0].tolist()
    assert counted == list(range(prompt - 1, prompt + 7))
    moved = set()
    for at in range(1, prompt + 8):
        other = copy.deepcopy(given)
        other["input_ids"][0, at] = (other["input_ids"][0, at] - 2) % 40 + 3
        after = states_of(made, other)
        changed = (plain != after).any(-1)[0]
        assert changed[at]
        moved |= {i for i in range(at) if changed[i]}
    assert not moved & set(counted)
    assert bool(moved) == ("ffn" in level), "inside a group tokens see later ones"


def test_labels_everywhere_leave_nothing_to_compress():
    with pytest.raises(
        ValueError, match=r"labels must be -100 \(none\) on a row's prompt where ffn"
    ):
        states_of(model({"ffn": 2}), batch([1, 1], [9, 7]))
    found = states_of(model({"attention_kv": 2}), batch([1, 1], [19, 17]))
    assert found.isfinite().all()


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_the_loss_is_what_it_says(tmp_path, level):
    made = model(level)
    weights = {"logits_weight": 0.5, "task_weight": 2.0, "layer_weight": 3.0}
    run = trainer(tmp_path, made, **weights)
    given = batch([17, 18], [6, 3])
    got = run.compute_loss(made, given)
    (state,) = vk.runtime.state.states(made)
    plain = {key: given[key] for key in ("input_ids", "attention_mask")}
    with vk.use_ratio(made, 1), torch.no_grad():
        teacher = made(**plain, output_hidden_states=True, use_cache=False)
    with vk.keep(made, decoders.decoded(given, state.kept, max(state.level.ratios))):
        student = made(**plain, output_hidden_states=True, use_cache=False)
    real, counted = given["attention_mask"] > 0, given["labels"][:, 1:] != IGNORED
    ours, theirs = (out.hidden_states for out in (student, teacher))
    expected = (ours[-1] - theirs[-1])[real].square().mean()
    inner = [
        ((a - b)[real].square().mean(-1) / b[real].square().mean(-1)).mean()
        for a, b in zip(ours[1:-1], theirs[1:-1], strict=True)
    ]
    expected = expected + 3.0 * sum(inner) / len(inner)
    said = [out.logits[:, :-1][counted].log_softmax(-1) for out in (student, teacher)]
    apart = (said[1].exp() * (said[1] - said[0])).sum(-1).mean()
    labels = given["labels"][:, 1:][counted]
    expected = expected + 0.5 * apart + 2.0 * torch.nn.functional.nll_loss(said[0], labels)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, run.trained) for loss in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def plugins(made):
    return [p.detach().clone() for p in vk.plugin_parameters(made)]


def test_the_loss_falls(tmp_path):
    run = trainer(tmp_path, max_steps=40)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    for name in ("eval_mixed_loss", "eval_mixed_divergence"):
        assert after[name] < 0.8 * before[name]
    assert after["eval_dense_perplexity"] == before["eval_dense_perplexity"]


@pytest.mark.parametrize("packed", [True, False])
def test_resuming_ends_bit_for_bit_alike(tmp_path, packed):
    settings = {"packed_products": packed, "task_weight": 0.5}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train(resume_from_checkpoint=True)
    trainer(tmp_path / "cut", **settings).train()
    (tmp_path / "cut" / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    other = model()
    tiny.train(other, seed=1)
    again = trainer(tmp_path / "cut", other, **settings)
    again.train(resume_from_checkpoint=True)
    for a, b in zip(plugins(whole.model), plugins(again.model), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_give_what_one_gives(tmp_path):
    train = rows()
    for i, row in enumerate(train):
        row["labels"] = [IGNORED] * (10 + i) + row["input_ids"][10 + i :]
    found = []
    for size, accumulated in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path / str(size),
            model(),
            train,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_grad_norm=0.0,
        )
        run.train()
        found.append(plugins(run.model))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_gradient_checkpointing_changes_nothing(tmp_path, level):
    found = []
    for saving in (False, True):
        run = trainer(tmp_path / str(saving), model(level), gradient_checkpointing=saving)
        run.train()
        found.append(plugins(run.model))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(found[0], plugins(model(level)), strict=True))


def test_dropout_of_the_model_still_matters_to_checkpointing(tmp_path):
    made = model(attention_dropout=0.1)
    with pytest.raises(ValueError, match="set dropout=True"):
        trainer(tmp_path, made, gradient_checkpointing=True)


def test_ratios_take_turns(tmp_path):
    made = model({"attention_kv": 2})
    made = vk.patch(vk.unpatch(made), None, (2, 4), placements=("ffn", "attention_kv"), window=5)
    run = trainer(tmp_path, made, sample_ratios=True, ratios_per_step=2)
    before = plugins(made)
    run.train()
    changed = [not torch.equal(a, b) for a, b in zip(before, plugins(made), strict=True)]
    assert sum(changed) > len(changed) // 2
    assert {"eval_k2_perplexity", "eval_k4_divergence"} <= set(run.evaluate())


def test_evaluates_perplexity(tmp_path):
    made = model()
    run = trainer(tmp_path, made, per_device_eval_batch_size=3)
    metrics = run.evaluate()
    unlikely, apart, count = [], 0.0, 0
    for row in rows():
        given = {key: torch.tensor([value]) for key, value in row.items()}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        hidden = states_of(made, given)
        with torch.no_grad(), vk.use_ratio(made, 1):
            theirs = made(given["input_ids"]).logits.log_softmax(-1)
        ours = made.lm_head(hidden).log_softmax(-1)
        counted = given["labels"][:, 1:] != IGNORED
        labels = given["labels"][:, 1:][counted]
        said = [logits[:, :-1][counted] for logits in (ours, theirs)]
        unlikely.append([-s.gather(1, labels[:, None]).sum().item() for s in said])
        apart += (said[1].exp() * (said[1] - said[0])).sum().item()
        count += len(labels)
    student, dense = (math.exp(sum(part) / count) for part in zip(*unlikely, strict=True))
    assert metrics["eval_mixed_perplexity"] == pytest.approx(student, rel=1e-4)
    assert metrics["eval_dense_perplexity"] == pytest.approx(dense, rel=1e-4)
    assert metrics["eval_mixed_divergence"] == pytest.approx(apart / count, rel=1e-3)


def test_a_decoder_without_a_head_learns_hidden_states(tmp_path):
    made = vk.patch(tiny.model(dtype=torch.float32).model, {"attention_kv": 3}, window=5)
    tiny.train(made)
    run = trainer(tmp_path, made, logits_weight=0.0, max_steps=20)
    before = run.evaluate()
    run.train()
    assert set(before) == {"eval_k3_loss", "eval_loss", "epoch"}
    assert run.evaluate()["eval_loss"] < before["eval_loss"]
    with pytest.raises(ValueError, match=r"must be 0 for a decoder without a head, got 1\.0 "):
        trainer(tmp_path, made)


def test_labels_are_tokens(tmp_path):
    given = batch([9, 9], [3, 3]) | {"labels": torch.tensor([0, 1])}
    with pytest.raises(
        ValueError, match=r"labels of a decoder must be tokens, .*\[2, 12\], got \[2\]"
    ):
        states_of(model(), given)


def test_padding_is_no_token_though_it_is_a_token_too():
    """Where a tokenizer has no padding, the end of a text pads, and ends texts as well."""
    from variator_kernels.train.collate import collator

    words = toy.tokenizer("</s> $A", pad=None)
    words.pad_token = words.eos_token
    made = [{"input_ids": [1, 5, 1], "labels": [-100, 5, 1]}, {"input_ids": [7], "labels": [7]}]
    got = collator(words, tiny.config())(made)
    assert got["attention_mask"].sum(1).tolist() == [3, 1]
    assert got["labels"][got["attention_mask"] == 0].tolist() == [IGNORED] * 2
    assert got["labels"][0].tolist() == [-100, 5, 1]


def test_the_label_of_a_first_token_changes_nothing(tmp_path):
    run = trainer(tmp_path, model({"attention_kv": 3}))
    given = batch([1, 1], [19, 17])
    more = given | {"labels": torch.where(given["attention_mask"] > 0, given["input_ids"], IGNORED)}
    losses = [run.compute_loss(run.model, one) for one in (given, more)]
    assert torch.equal(*losses)


def test_keys_have_a_rate_of_their_own(tmp_path):
    """After one step of SGD what moved is the gradient times the rate."""
    found = {}
    for rate in (1.0, 8.0):
        settings = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "key_rate": rate}
        run = trainer(tmp_path / str(rate), max_steps=1, learning_rate=1e-4, **settings)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        found[rate] = {
            name: before[name] - p.detach()
            for name, p in run.model.named_parameters()
            if p.requires_grad
        }
    assert any("mlp" in name for name in found[1.0]) and any("attn" in n for n in found[1.0])
    for name, moved in found[1.0].items():
        factor = 8 if "attn" in name else 1
        torch.testing.assert_close(found[8.0][name], factor * moved, rtol=1e-2, atol=1e-6)
    with pytest.raises(ValueError, match="key_rate must be a finite number > 0, got 0"):
        trainer(tmp_path, key_rate=0.0)


def test_runs_with_a_rate_for_keys_go_on(tmp_path):
    whole = trainer(tmp_path / "whole", key_rate=5.0)
    whole.train(resume_from_checkpoint=True)
    trainer(tmp_path / "cut", key_rate=5.0).train()
    (tmp_path / "cut" / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    again = trainer(tmp_path / "cut", key_rate=5.0)
    again.train(resume_from_checkpoint=True)
    for a, b in zip(plugins(whole.model), plugins(again.model), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_a_complete_group(tmp_path):
    """Rows too short for one may come at any step; if there are no others, that is said."""
    short = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    given = {"max_steps": 3, "logits_weight": 0.0}
    made = model({"attention_kv": 4}, keep_first=1)
    before = plugins(made)
    trainer(tmp_path / "some", made, rows() + short, **given).train()
    assert not all(torch.equal(a, b) for a, b in zip(before, plugins(made), strict=True))
    made = model({"attention_kv": 4}, keep_first=1)
    with pytest.raises(ValueError, match="nothing was trained, in no step"):
        trainer(tmp_path / "none", made, short, **given, weight_decay=0.0).train()
    assert all(torch.equal(a, b) for a, b in zip(before, plugins(made), strict=True))


def test_labels_of_another_shape_are_refused(tmp_path):
    made = objective(model(), task_weight=1.0)
    given = batch([12, 9], [4, 4]) | {"labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"labels of a decoder must be tokens.*got \[2\]"):
        made.counts(given)


def test_a_process_without_a_complete_group_says_so(tmp_path, monkeypatch):
    """The others would wait for its gradients."""
    made = trainer(tmp_path, model({"attention_kv": 4}, keep_first=1), logits_weight=0.0)
    monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"no row of a step had a complete group.*one process"):
        made.compute_loss(made.model, batch([3, 3], [1, 1]))
