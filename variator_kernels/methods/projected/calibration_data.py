"""What a model is run on to see how it uses its dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...sites.residual import Layout

Batch = dict[str, Any]
IGNORED = -100


def checked(batches: Iterable[Mapping[str, Any]] | None, why: str) -> list[Batch]:
    """The batches, read once.

    Raises:
        TypeError: a batch is not a mapping. ValueError: there is none, or one has no input_ids.
    """
    if batches is None:
        raise ValueError(f"batches must be given, {why}, got None")
    found = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches must hold mappings of the model's arguments, got {type(batch).__name__}"
            )
        if "input_ids" not in batch:
            raise ValueError(f"batches must have input_ids, got {sorted(batch)}")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise TypeError(f"batches' input_ids must be a tensor, got {type(ids).__name__}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"batches' attention_mask must have shape {list(ids.shape)}, as input_ids, got "
                f"{list(mask.shape)}"
            )
        if ids.numel() == 0 or (mask is not None and not mask.any()):
            raise ValueError("batches must have real tokens, got one with none (attention_mask)")
        found.append(dict(batch))
    if not found:
        raise ValueError(f"batches must hold at least one batch, {why}, got none")
    return found


def arguments(model: nn.Module, layout: Layout, batch: Batch) -> Batch:
    """What the model is called with: on its device, without a cache."""
    device = next(model.parameters()).device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if len(layout.stacks) > 1 and not {"labels", "decoder_input_ids"} & given.keys():
        raise ValueError(
            "batches must have labels or decoder_input_ids for an encoder-decoder, got "
            f"{sorted(batch)}"
        )
    if layout.residual is not None:
        given["use_cache"] = False
    return given


def masks(layout: Layout, given: Batch) -> list[Tensor | None]:
    """Where each stack's real tokens are, ``[B, n]`` bool; None: everywhere."""
    own = given.get("attention_mask")
    found = [None if own is None else own != 0]
    if len(layout.stacks) > 1:
        theirs = given.get("decoder_attention_mask")
        if theirs is None and given.get("decoder_input_ids") is None:
            theirs = given["labels"] != IGNORED
        found.append(None if theirs is None else theirs != 0)
        if theirs is not None and not (theirs != 0).any():
            raise ValueError("batches must have real tokens, got one with none (labels)")
    return found


def tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """``[T, width]`` of ``[B, n, width]``: the real ones, in float64."""
    flat = value.flatten(0, -2) if mask is None else value[mask]
    return flat.double()


class Forwards:
    """A model's forwards over batches, watched by hooks."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.mask: Tensor | None = None
        """Where the tokens of the stack that runs are real, ``[B, n]`` bool; None: everywhere."""

    def run(self, batches: list[Batch], hooks: list[RemovableHandle]) -> None:
        """All of them; ``hooks``, which may ask for :attr:`mask`, are removed behind the last."""
        current: list[Tensor | None] = []
        for position, stack in enumerate(self.layout.stacks):
            root = self.model.get_submodule(stack.root) if stack.root else self.model

            def begin(module: nn.Module, args: Any, position: int = position) -> None:
                self.mask = current[position]

            hooks.append(root.register_forward_pre_hook(begin))
        try:
            for batch in batches:
                given = arguments(self.model, self.layout, batch)
                current[:] = masks(self.layout, given)
                self.mask = current[0]
                self.model(**given)
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation; afterwards each module in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
