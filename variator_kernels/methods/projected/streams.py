"""Both models' hidden states in front of the same block, so that the small model is made one block
after another and nothing below runs again.

A block of either model gets the arguments that the original's got in one whole forward: masks,
rotations and position biases do not depend on the hidden size. Only hidden states do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...sites.residual import Block, Blocks, Layout, Sublayer
from . import calibration_data as data
from .calibration_data import Batch

HIDDEN_STATES = "hidden_states"


class _Reached(Exception):
    """What was looked for has been seen: the rest of a forward is not needed."""


def at_input(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that ``module`` gets in ``run()``, which ends there."""
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Reached:
        return seen[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()
    raise ValueError(f"model never ran a {type(module).__name__} on batches")


def at_inputs(modules: list[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """The first argument of each of ``modules`` in ``run()``, which ends at the last."""
    seen: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[id(module)] = first(args, kwargs)

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules[:-1]]
    try:
        last = first(*at_input(modules[-1], run))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[id(module)] for module in modules[:-1]] + [last]


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs[HIDDEN_STATES]


class _Pair:
    """One batch: what the original's blocks got, and both models' hidden states now."""

    def __init__(self, model: nn.Module, layout: Layout, batch: Batch) -> None:
        self.given = data.arguments(model, layout, batch)
        self.masks = data.masks(layout, self.given)
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.begins: dict[str, Tensor] = {}
        self.memory: list[tuple[Tensor, Tensor | None]] = []
        """What stacks gave to later ones: the original's, and the small model's."""
        self.big = self.small = torch.empty(0)
        handles = []
        for stack in layout.stacks:
            for block in stack.blocks:
                place = model.get_submodule(block.name)
                record = self._record(block.name, block is stack.blocks[0])
                handles.append(place.register_forward_pre_hook(record, with_kwargs=True))
            if stack is not layout.stacks[-1]:
                root = model.get_submodule(stack.root)
                handles.append(root.register_forward_hook(self._remember))
        try:
            model(**self.given)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, begins: bool) -> Any:
        from transformers import Cache  # an import of the package is light

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if begins:
                self.begins[name] = first(args, kwargs)
            rest = tuple(None if isinstance(value, Cache) else value for value in args[1:])
            more = {
                key: None if isinstance(value, Cache) else value
                for key, value in kwargs.items()
                if key != HIDDEN_STATES
            }
            self.calls[name] = rest, more

        return hook

    def _remember(self, module: nn.Module, args: Any, out: Any) -> None:
        self.memory.append((out[0] if not isinstance(out, Tensor) else out, None))

    def call(self, block: nn.Module, name: str, small: bool) -> Any:
        """Run a block of either model on its hidden states."""
        args, kwargs = self.calls[name]

        def own(value: Any) -> Any:
            for theirs, ours in self.memory if small else ():
                if value is theirs:
                    return ours
            return value

        hidden = self.small if small else self.big
        more = {key: own(value) for key, value in kwargs.items()}
        return block(hidden, *map(own, args), **more)


class Streams:
    """All batches; ``layout`` of both models."""

    def __init__(self, model: nn.Module, small: nn.Module, layout: Layout, batches: list[Batch]):
        self.models, self.layout = (model, small), layout
        self.pairs = [_Pair(model, layout, batch) for batch in batches]

    def begin(self, position: int) -> None:
        """Go in front of a stack's first block. The small model's stacks before are whole."""
        stack = self.layout.stacks[position]
        small = self.models[1]
        place = small.get_submodule(stack.blocks[0].name)
        for pair in self.pairs:
            pair.big = pair.begins[stack.blocks[0].name]
            pair.small = first(*at_input(place, lambda pair=pair: small(**pair.given)))  # type: ignore

    def inputs(self, position: int, block: Block, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """What the module ``name`` of a block reads, of real tokens: ``[T, width]`` in float64, in
        the original and in the small model, batch by batch."""
        for pair in self.pairs:
            big, small = (self._input(pair, position, block, name, who) for who in (False, True))
            yield big, small

    def originals(self, position: int, block: Block, name: str) -> Iterator[Tensor]:
        """The same in the original alone."""
        for pair in self.pairs:
            yield self._input(pair, position, block, name, False)

    def _input(self, pair: _Pair, position: int, block: Block, name: str, small: bool) -> Tensor:
        model = self.models[small]
        place, reader = model.get_submodule(block.name), model.get_submodule(name)
        got = at_input(reader, lambda: pair.call(place, block.name, small))
        return data.tokens(first(*got), pair.masks[position])

    def drifts(
        self, position: int, block: Block, part: Sublayer, later: str, q: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the last layer of ``part`` should give the small model, so that its stream behind is
        the original's in the basis ``q``; and what that layer reads. ``later``: the norm of the
        next sublayer of the block, or nothing."""
        big, small = (model.get_submodule(block.name) for model in self.models)
        for pair in self.pairs:
            mask = pair.masks[position]
            if later:
                place = self.models[0].get_submodule(later)
                after = first(*at_input(place, lambda pair=pair: pair.call(big, block.name, False)))  # type: ignore[misc]
            else:
                after = _hidden(pair.call(big, block.name, False))
            before, reads = at_inputs(
                [self.models[1].get_submodule(name) for name in (part.norm, part.writes)],
                lambda pair=pair: pair.call(small, block.name, True),  # type: ignore[misc]
            )
            wanted = data.tokens(after, mask)
            wanted = wanted if q is None else wanted @ q
            yield wanted - data.tokens(before, mask), data.tokens(reads, mask)

    def advance(self, block: Block) -> None:
        """Go behind a block."""
        big, small = (model.get_submodule(block.name) for model in self.models)
        for pair in self.pairs:
            pair.big = _hidden(pair.call(big, block.name, False))
            pair.small = _hidden(pair.call(small, block.name, True))

    def outputs(self, position: int, stack: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
        """What the norm behind the last block gives, as :meth:`inputs`."""
        big, small = (model.get_submodule(stack.norm) for model in self.models)
        for pair in self.pairs:
            mask = pair.masks[position]
            yield data.tokens(big(pair.big), mask), data.tokens(small(pair.small), mask)

    def end(self, position: int, stack: Blocks) -> None:
        """Later stacks read what this one gives."""
        norm = self.models[1].get_submodule(stack.norm)
        for pair in self.pairs if stack is not self.layout.stacks[-1] else ():
            theirs, _ = pair.memory[position]
            pair.memory[position] = theirs, norm(pair.small)


def _hidden(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
