"""What training does to rows: masked tokens for BERT and corrupted spans for T5 in pre-training,
spliced rows in both steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling

from .rows import Noise

RATE, MEAN_SPAN = 0.15, 3.0


def masked_tokens(tokenizer: Any, rate: float = RATE) -> Noise:
    """``rate`` of the tokens become the mask token (of these 10 % a random one, 10 % stay).

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError(
            "the tokenizer must have a mask token to pre-train an encoder, it has none: set noise "
            "to none"
        )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=rate)

    def noise(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        collator.generator = generator
        ids, _ = collator.torch_mask_tokens(torch.tensor([row["input_ids"]]))
        return {"input_ids": ids[0].tolist()}

    return noise


def corrupted_spans(tokenizer: Any, rate: float = RATE, mean_span: float = MEAN_SPAN) -> Noise:
    """``rate`` of the tokens, in spans of ``mean_span`` on average, become a sentinel a span; the
    labels are the sentinels, each before its tokens (T5, section 3.1.4 of its paper).

    Raises:
        ValueError: the tokenizer has no ``<extra_id_0>``, or a text needs more sentinels.
    """
    vocabulary = tokenizer.get_vocab()
    sentinels: list[int] = []
    while (word := f"<extra_id_{len(sentinels)}>") in vocabulary:
        sentinels.append(vocabulary[word])
    if not sentinels:
        raise ValueError("the tokenizer must have <extra_id_0> and so on to pre-train a T5")
    end = [tokenizer.eos_token_id]

    def noise(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        ids = row["input_ids"]
        ids = ids[:-1] if ids[-1:] == end else ids
        spans = _spans(len(ids), rate, mean_span, generator)
        if len(spans) >= len(sentinels):
            raise ValueError(
                f"a text of {len(ids)} tokens needs {len(spans) + 1} sentinels, the tokenizer has "
                f"{len(sentinels)}: lower max_length"
            )
        inputs, labels, done = [], [], 0
        for sentinel, (start, stop) in zip(sentinels, spans, strict=False):
            inputs += [*ids[done:start], sentinel]
            labels += [sentinel, *ids[start:stop]]
            done = stop
        inputs += [*ids[done:], *end]
        return {"input_ids": inputs, "labels": [*labels, sentinels[len(spans)], *end]}

    return noise


def spliced(rows: Sequence[dict[str, Any]], tokenizer: Any, rate: float = 1.0) -> Noise:
    """``rate`` of the rows go on, from a random place, with a piece of another of ``rows``.

    Special tokens, token types and the length stay. What the teacher makes of such a row is as good
    a target as any, and a small task has many more of them than rows: without, plugins that see
    each row more than once fit those rows. The row's label no longer holds.
    """
    special = set(tokenizer.all_special_ids)
    texts = [[token for token in row["input_ids"] if token not in special] for row in rows]
    texts = [text for text in texts if text]

    def below(limit: int, generator: torch.Generator) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    def noise(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        ids = list(row["input_ids"])
        places = [i for i, token in enumerate(ids) if token not in special]
        if len(places) < 2 or float(torch.rand(1, generator=generator)) >= rate:
            return row
        places = places[1 + below(len(places) - 1, generator) :]
        text = texts[below(len(texts), generator)]
        start = below(len(text), generator)
        for i, place in enumerate(places):
            ids[place] = text[(start + i) % len(text)]
        return {**row, "input_ids": ids}

    return noise


def chained(first: Noise, then: Noise | None) -> Noise:
    """One after the other, from one generator."""
    if then is None:
        return first

    def noise(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return then(first(row, generator), generator)

    return noise


def _spans(
    length: int, rate: float, mean_span: float, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Starts and ends of the spans, kept text before each."""
    noisy = min(max(round(length * rate), 1), length - 1)
    number = min(max(round(noisy / mean_span), 1), noisy, length - noisy)
    kept = _parts(length - noisy, number, generator)
    spans, position = [], 0
    for skip, size in zip(kept, _parts(noisy, number, generator), strict=True):
        spans.append((position + skip, position + skip + size))
        position += skip + size
    return spans


def _parts(total: int, number: int, generator: torch.Generator) -> list[int]:
    """``total`` as a sum of ``number`` positive integers, each way equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: number - 1].add(1).sort().values
    return torch.tensor([0, *cuts.tolist(), total]).diff().tolist()
