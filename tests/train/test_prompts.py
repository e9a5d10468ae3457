"""Rows of decoders: runs of text, prompts and answers."""

import pytest
import torch

from tests.train import toy
from variator_kernels.train import prompts
from variator_kernels.train.data import Row
from variator_kernels.train.losses import IGNORED

BEGIN = toy.tokenizer("</s> $A")
END = toy.tokenizer()


def paragraphs(number=5):
    return [Row(f"x:{i}", {"text": text}) for i, text in enumerate(toy.sentences(number, 30, 40))]


def row(text, place="x:1"):
    return Row(place, {"text": text})


@pytest.mark.parametrize(("words", "begin"), [(BEGIN, [1]), (END, [])], ids=["begin", "end"])
def test_text_is_one_run_cut_into_whole_rows(words, begin):
    read = paragraphs()
    made = prompts.packed(read, words, 20, None)
    whole = words(" ".join(r.values["text"] for r in read), add_special_tokens=False)["input_ids"]
    size = 20 - len(begin)
    assert len(made) == len(whole) // size
    for i, one in enumerate(made):
        assert one["input_ids"] == begin + whole[i * size : (i + 1) * size]
        assert one["labels"] == [IGNORED, *one["input_ids"][1:]]


def test_a_continuation_alone_has_labels():
    for one in prompts.packed(paragraphs(), BEGIN, 20, 5):
        assert one["labels"] == [IGNORED] * 15 + one["input_ids"][15:]


def test_a_short_text_is_one_row():
    (one,) = prompts.packed([row("w1 w2 w3 w4 w5 w6 w7 w8 w9")], BEGIN, 20, None)
    assert len(one["input_ids"]) == 10
    with pytest.raises(ValueError, match="data must hold at least 8 tokens, got 2"):
        prompts.packed([row("w1 w2")], BEGIN, 20, None)
    with pytest.raises(ValueError, match=r"max_length must be at least 14 .* got 13"):
        prompts.packed(paragraphs(), BEGIN, 13, 5)


def test_prompt_and_answer_are_one_text():
    read = [row("w1 w2 w3"), row("w4")]
    made = prompts.answered(read, ["good", "bad w5"], BEGIN, None, None)
    ids = BEGIN("w1 w2 w3 good")["input_ids"], BEGIN("w4 bad w5")["input_ids"]
    assert [one["input_ids"] for one in made] == list(ids)
    assert made[0]["labels"] == [IGNORED] * 4 + ids[0][-1:]
    assert made[1]["labels"] == [IGNORED] * 2 + ids[1][-2:]


def test_white_space_belongs_to_the_answer():
    """So that a word starts as it does in text: byte-level tokenizers put the blank in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("abcĠĊ:")}
    vocabulary = letters | {"Ġa": 6, "aĠ": 7}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = PreTrainedTokenizerFast(tokenizer_object=made)
    for prompt, between in (("b:", [6]), ("b: ", [6]), ("b:\n", [4, 0])):
        (one,) = prompts.answered([row(prompt)], ["a"], words, None, None)
        assert one["input_ids"] == [1, 5, *between]
        assert one["labels"] == [IGNORED] * 2 + between


def test_long_prompts_lose_their_beginning():
    read = [row("w1 w2 w3 w4 w5")]
    (one,) = prompts.answered(read, ["good bad"], BEGIN, 5, 9)
    assert one["input_ids"] == BEGIN("w4 w5 good bad")["input_ids"]
    assert one["labels"].count(IGNORED) == 3
    with pytest.raises(
        ValueError, match=r"room for an answer .*x:1 has an answer of 2 tokens, got 3"
    ):
        prompts.answered(read, ["good bad"], BEGIN, 3, 9)
    with pytest.raises(ValueError, match=r"x:1 has 8 tokens, the model takes 6"):
        prompts.answered(read, ["good bad"], BEGIN, None, 6)
    with pytest.raises(ValueError, match="max_length must be at most 6"):
        prompts.answered(read, ["good bad"], BEGIN, 7, 6)


@pytest.mark.parametrize(("prompt", "answer"), [(" ", "good"), ("w1", " "), ("", "")])
def test_neither_may_be_empty(prompt, answer):
    with pytest.raises(ValueError, match="x:1 must have a prompt and an answer"):
        prompts.answered([row(prompt)], [answer], BEGIN, None, None)


READ = [row("w1 w2"), row("w3 w4 w5"), row("w6")]


@pytest.mark.parametrize(
    "names", [("good", "bad"), ("w7 good", "w7 bad w8"), ("w1 w2 w3", "w1 w4")]
)
def test_the_first_token_that_differs_decides(tmp_path, names):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy.llama(tmp_path))
    answers = [names[i % 2] for i in range(3)]
    made = prompts.answered(READ, answers, BEGIN, None, None)
    correct = prompts.by_label(model, BEGIN, READ[0], made[:1], names)
    right = []
    for one in made:
        batch = {key: torch.tensor([value]) for key, value in one.items()}
        with torch.no_grad():
            out = model(batch["input_ids"], output_hidden_states=True)
        right.append(bool(correct(out, batch)))
        words = [BEGIN(name, add_special_tokens=False)["input_ids"] for name in names]
        at = next(i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b)
        own = one["labels"].index(next(t for t in one["labels"] if t != IGNORED)) + at
        scores = [float(out.logits[0, own - 1, word[at]]) for word in words]
        assert right[-1] == (scores.index(max(scores)) == made.index(one) % 2)


def test_labels_that_cannot_be_told_apart_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy.llama(tmp_path))
    made = prompts.answered(READ, ["w7", "w8", "w7"], BEGIN, None, None)
    assert prompts.by_label(model, BEGIN, READ[0], made, ()) is None
    for names in (("w7 w2", "w7 w3", "w8"), ("w7", "w7 w2", "w8"), ("w7", "w7"), ("w7", "w9")):
        with pytest.raises(ValueError, match="labels must each be the same tokens"):
            prompts.by_label(model, BEGIN, READ[0], made, names)
