"""Random walks over what can happen to a cache, against the whole computation of each row."""

import random

import pytest
import torch
from transformers import DynamicCache

from tests.decoders import tiny

OPERATIONS = ("one", "one", "several", "crop", "select", "repeat")


def grown(chance: random.Random, tokens, mask, n):
    """Columns of tokens, sometimes with padding anywhere."""
    rows = len(tokens)
    new = torch.randint(3, tiny.VOCABULARY, (rows, n))
    real = torch.ones_like(new)
    if chance.random() < 0.4:
        real = (torch.rand(rows, n) > 0.3).long()
    return torch.cat((tokens, new), 1), torch.cat((mask, real), 1)


def check(model, cache, tokens, mask, n):
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"attention_mask": mask} if (mask == 0).any() else {}
    got = model(
        tokens[:, -n:], past_key_values=cache, position_ids=positions[:, -n:], **given
    ).logits
    for row, real in enumerate(mask > 0):
        new = real[-n:]
        if new.any():
            wanted = model(tokens[row][real][None], use_cache=False).logits[0, -int(new.sum()) :]
            torch.testing.assert_close(got[row][new], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_walk(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = tiny.patched(
        ratio={"attention_kv": chance.choice([2, 3, 4, 5])},
        window=chance.choice([0, 1, 3, 7, 20]),
        keep_first=chance.choice([0, 1, 4, 9]),
        num_hidden_layers=1,
    )
    cache = DynamicCache()
    tokens = mask = torch.zeros(chance.choice([1, 2, 3]), 0, dtype=torch.long)
    for _ in range(14):
        operation = chance.choice(OPERATIONS)
        if operation in ("one", "several") or tokens.shape[1] == 0:
            n = 1 if operation == "one" else chance.choice([2, 3, 7, 11, 70])
            tokens, mask = grown(chance, tokens, mask, n)
            check(model, cache, tokens, mask, n)
        elif operation == "crop":
            back = chance.choice([1, 2, 5, 9])
            try:
                cache.crop(-back)
            except ValueError:
                continue  # what is gone is refused, and nothing has changed
            tokens, mask = tokens[:, :-back], mask[:, :-back]
        elif operation == "select":
            rows = [chance.randrange(len(tokens)) for _ in range(chance.choice([1, 2, 3]))]
            cache.batch_select_indices(torch.tensor(rows))
            tokens, mask = tokens[rows], mask[rows]
        elif len(tokens) < 3:
            cache.batch_repeat_interleave(2)
            tokens, mask = tokens.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
