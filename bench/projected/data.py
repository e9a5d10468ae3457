"""Text as rows of tokens: bytes for the tiny model, the model's own tokens for others. The starts
and the training see wikitext2's validation text, losses are of its test text."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

TRAIN, TEST = Path("wikitext2") / "valid.txt", Path("wikitext2") / "test.txt"
BATCH = 8


class Text(NamedTuple):
    """Token ids, ``[T]`` each, and the length of a row."""

    train: Tensor
    test: Tensor
    length: int

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, length]`` from anywhere in the training text."""
        begins = torch.randint(len(self.train) - self.length, (count,), generator=generator)
        return torch.stack([self.train[i : i + self.length] for i in begins.tolist()])

    def held_out(self, count: int) -> Tensor:
        """``[count, length]``, evenly over the test text."""
        every = self.test[: len(self.test) // self.length * self.length].view(-1, self.length)
        return every[:: max(1, len(every) // count)][:count]


def read(folder: Path, tokenizer: Path | None, length: int) -> Text:
    """``tokenizer``: a folder; None: bytes.

    Raises:
        FileNotFoundError: there is no such text.
    """
    found = []
    for name in (TRAIN, TEST):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"data must be a folder with {name}, got {folder}")
        if tokenizer is None:
            found.append(torch.tensor(list((folder / name).read_bytes())))
        else:
            tokenize: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            words = (folder / name).read_text(encoding="utf-8")
            found.append(tokenize(words, return_tensors="pt", verbose=False)["input_ids"][0])
    return Text(found[0], found[1], length)


@torch.no_grad()
def loss(model: Any, rows: Tensor) -> float:
    """Mean negative log-likelihood of every token but a row's first, in nats."""
    training = model.training
    model.eval()
    total = 0.0
    for some in rows.split(BATCH):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train(training)
    return total / (rows.numel() - len(rows))
