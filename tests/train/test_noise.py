"""What pre-training does to text: how much of it, and the same each time."""

import pytest
import torch

from tests.train import toy
from variator_kernels.train.noise import corrupted_spans, masked_tokens, spliced
from variator_kernels.train.rows import Rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_spans_can_be_put_back():
    words = toy.tokenizer()
    sentinels = [words.get_vocab()[word] for word in toy.SENTINELS]
    noise = corrupted_spans(words)
    for length in (2, 3, 9, 20, 40):
        ids = [*torch.randint(3, 60, (length,), generator=generator(length)).tolist(), 1]
        out = noise({"input_ids": ids}, generator(length))
        inputs, labels = out["input_ids"], out["labels"]
        assert inputs[-1] == labels[-1] == 1, "both end a text"
        pieces, key = {}, None
        for token in labels[:-1]:
            key = token if token in sentinels else key
            pieces.setdefault(key, [])
            pieces[key] += [token] * (token != key)
        used = [token for token in inputs if token in sentinels]
        assert used == sentinels[: len(used)]
        assert list(pieces) == sentinels[: len(used) + 1] and pieces[sentinels[len(used)]] == []
        restored = [t for token in inputs for t in pieces.get(token, [token])]
        assert restored == ids


def test_spans_have_the_rate_and_the_mean_asked_for():
    noise = corrupted_spans(toy.tokenizer(), rate=0.15, mean_span=3.0)
    kept, removed, spans = 0, 0, 0
    for seed in range(200):
        out = noise({"input_ids": [5] * 80 + [1]}, generator(seed))
        holes = sum(token > 60 for token in out["input_ids"])
        spans += holes
        kept += len(out["input_ids"]) - holes - 1
        removed += len(out["labels"]) - holes - 2
    assert kept + removed == 200 * 80
    assert removed / (kept + removed) == pytest.approx(0.15, abs=0.002)
    assert removed / spans == pytest.approx(3.0, abs=0.01)


def test_masks_the_rate_asked_for_and_no_special_token():
    words = toy.tokenizer()
    words.mask_token = "w0"
    noise = masked_tokens(words, rate=0.15)
    ids = [*range(10, 60), 1] * 40
    out = noise({"input_ids": ids}, generator())["input_ids"]
    assert [b for a, b in zip(ids, out, strict=True) if a == 1] == [1] * 40
    changed = sum(a != b for a, b in zip(ids, out, strict=True))
    assert changed / 2000 == pytest.approx(0.135, abs=0.02), "15 %, of which a tenth stays"


def test_spliced_rows_go_on_with_another_text():
    words = toy.tokenizer()
    (end,) = words("")["input_ids"]
    others = [{"input_ids": [40, 41, 42, end]}, {"input_ids": [end]}]
    row = {"input_ids": [*range(5, 15), end, *range(15, 20), end], "labels": [7], "types": [0] * 17}
    noise = spliced(others, words)
    cuts = set()
    for seed in range(60):
        out = noise(row, generator(seed))
        assert out.keys() == row.keys() and out["labels"] == [7] and out["types"] == [0] * 17
        ids = [t for t in out["input_ids"] if t != end]
        assert [i for i, t in enumerate(out["input_ids"]) if t == end] == [10, 16]
        cut = next(i for i, t in enumerate(ids) if t >= 40)
        assert ids[:cut] == list(range(5, 5 + cut)), "its beginning stays"
        steps = {(b - a) % 3 for a, b in zip(ids[cut:], ids[cut + 1 :], strict=False)}
        assert min(ids[cut:]) >= 40 and steps <= {1}, "the other text in its order"
        cuts.add(cut)
    assert cuts == set(range(1, 15)), "at any place behind the first token"


def test_the_part_of_rows_that_is_spliced():
    words, rows = toy.tokenizer(), [{"input_ids": [*range(5, 45), 1]}]
    noise = spliced([{"input_ids": [50] * 9}], words, 0.3)
    changed = sum(noise(rows[0], generator(seed)) != rows[0] for seed in range(1000))
    assert changed == pytest.approx(300, abs=45)
    for short in ([], [1], [5, 1]):
        assert noise({"input_ids": short}, generator())["input_ids"] == short


def test_refuses_a_tokenizer_without_what_it_needs():
    words = toy.tokenizer()
    with pytest.raises(ValueError, match="must have a mask token"):
        masked_tokens(words)
    with pytest.raises(ValueError, match="needs 10 sentinels, the tokenizer has 8"):
        corrupted_spans(words)({"input_ids": [5] * 180 + [1]}, generator())


def test_noise_is_new_each_turn_and_the_same_each_time():
    rows = [{"input_ids": [*range(5, 45), 1]}]

    def draw(row, turn, seed=0):
        return Rows(rows, corrupted_spans(toy.tokenizer()), seed).draw(row, turn)

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(0, 0, seed=1)
