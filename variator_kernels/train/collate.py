"""Rows to batches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from .decoders import is_decoder
from .losses import IGNORED


def collator(tokenizer: Any, config: Any) -> Any:
    """Pads to the longest row, and tokens' labels; for an encoder-decoder also makes the decoder's
    inputs.

    Args:
        config: the model's.
    """
    if config.is_encoder_decoder:
        return DataCollatorForSeq2Seq(tokenizer, model=_Decoder(config))
    if is_decoder(config):
        return DataCollatorForSeq2Seq(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def batches(rows: Any, pad: Any, size: int = 64) -> list[Any]:
    """All ``rows`` in batches of up to ``size``, padded by a collator."""
    starts = range(0, len(rows), size)
    return [pad([rows[i] for i in range(start, min(start + size, len(rows)))]) for start in starts]


class _Decoder:
    """Decoder inputs as the model makes them from labels; not all of its classes do."""

    def __init__(self, config: Any) -> None:
        self.start, self.pad = config.decoder_start_token_id, config.pad_token_id

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        shifted = labels.roll(1, -1)
        shifted[:, 0] = self.start
        return shifted.masked_fill(shifted == IGNORED, self.pad)
