"""The classes that patched modules get: subclasses of their own, made by name on demand.

``patch`` swaps an instance's ``__class__``. That keeps parameter names, copies and pickles: a
pickle stores ``variator_kernels.sites.classes.<Name>``, which ``__getattr__`` below makes again
in a fresh process. A subclass keeps the name of its original, since ``transformers`` and the
sharding tools look classes up by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..runtime.ratio import Active, PluginState
from .families import FAMILIES, ROW, Family, follow
from .feed_forward import describe
from .find import whole_rows

ORIGINAL = "variator_original"
"""Class attribute of a generated class: the class it replaces."""
_MASK_INDEX = "variator_mask_index"


class _Encoder(nn.Module):
    """Holds (mask, ratio) ready for the sublayers, which ``transformers`` never passes the mask."""

    variator_state: PluginState
    variator_family: Family
    variator_mask_index: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, index = self.variator_state, self.variator_mask_index
        local, ratio = state.local, state.resolve()
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > index:
            mask = args[index]
        if ratio > 1 or local.observer is not None:
            mask = _token_mask(mask)
        quiet = torch.compiler.is_compiling() or self.training or state.warned
        if ratio > 1 and not quiet:
            _warn_if_untrained(self, ratio)
        outer = local.active
        local.active = Active(mask, ratio)
        try:
            return super().forward(*args, **kwargs)
        finally:
            local.active = outer


class _Block(nn.Module):
    """Carries (mask, ratio) through gradient checkpointing.

    The recompute runs in backward, where the encoder's forward and ``use_ratio`` may be over: so
    the values travel with the call that is checkpointed, as one more keyword argument.
    """

    variator_state: PluginState
    gradient_checkpointing: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            state = self.variator_state
            kwargs["variator_active"] = state.local.active or Active(None, state.resolve())
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, variator_active: Active | None = None, **kwargs: Any) -> Any:
        if variator_active is None:
            return super().forward(*args, **kwargs)
        local = self.variator_state.local
        outer = local.active
        local.active = variator_active
        try:
            return super().forward(*args, **kwargs)
        finally:
            local.active = outer


class _Sublayer(nn.Module):
    """The FFN sublayer, on merged groups of tokens."""

    variator_state: PluginState
    variator_family: Family
    plugins: nn.ModuleDict

    def _compress(self, hidden_states: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
        state = self.variator_state
        active = state.local.active
        if active is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "a patched FFN is recomputed outside its encoder, without mask and ratio: "
                    "checkpoint with model.gradient_checkpointing_enable(), or the whole encoder"
                )
            active = Active(None, state.resolve())
        mask, ratio = active
        if state.local.observer is not None:
            state.local.observer(self, hidden_states, mask, ratio)
        if ratio == 1:
            return dense(hidden_states)
        whole_rows(self)
        if mask is not None and mask.device != hidden_states.device:
            mask = mask.to(hidden_states.device)
        plugin: Any = self.plugins[str(ratio)]
        return functional.compressed_ffn(
            hidden_states, plugin.weights(), describe(self), mask=mask, backend=state.backend
        )


class _Layer(_Sublayer):
    """A module that is the FFN sublayer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._compress(hidden_states, super().forward)


class _BlockWithChunk(_Block, _Sublayer):
    """A block that has the FFN sublayer as a method."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        dense = super().feed_forward_chunk  # type: ignore[misc]
        return self._compress(attention_output, dense)


def _token_mask(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must have shape [batch, length] at a ratio above 1 (it tells the "
            f"groups where a row's tokens are), got {got}"
        )
    checks.mask_values(mask, "attention_mask")
    return mask != 0 if mask.is_floating_point() else mask


def _warn_if_untrained(encoder: _Encoder, ratio: int) -> None:
    """Once per model: the plugins still have their initial values."""
    state, family = encoder.variator_state, encoder.variator_family
    if ratio in state.trained:
        return
    for block in follow(encoder, family.blocks):
        plugin = follow(block, family.sublayer).plugins[str(ratio)]
        for weight in (plugin.adapter.w2, plugin.merge.weight):
            if weight.is_meta or type(weight) is not nn.Parameter or bool(weight.any()):
                state.trained.add(ratio)
                return
    state.warned = True
    warnings.warn(
        f"the plugins of ratio {ratio} are untrained: each group of {ratio} tokens gets the FFN "
        "output of its mean. Train them or load_plugins()",
        UserWarning,
        stacklevel=4,
    )


def _roles(family: Family) -> dict[str, type[nn.Module]]:
    if family.block == family.layer:
        return {family.encoder: _Encoder, family.block: _BlockWithChunk}
    return {family.encoder: _Encoder, family.block: _Block, family.layer: _Layer}


@functools.cache
def patched_class(family: Family, name: str) -> type[nn.Module]:
    """The subclass that replaces the family's class ``name`` (its encoder, block or layer)."""
    original = getattr(importlib.import_module(family.module), name)
    mixin = _roles(family)[name]
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"A patched ``{name}``: {mixin.__doc__}",
        ORIGINAL: original,
        ROW: family,
    }
    if mixin is _Encoder:
        # generate() reads the encoder's signature to learn which arguments it takes.
        signature = inspect.signature(original.forward)
        forward: Any = _Encoder.forward
        copy: Any = types.FunctionType(
            forward.__code__, forward.__globals__, "forward", None, forward.__closure__
        )
        copy.__signature__ = signature
        body["forward"] = copy
        body[_MASK_INDEX] = list(signature.parameters).index("attention_mask") - 1
    kind = type(name, (mixin, original), body)
    # Where transformers looks up, by the class's full name, which hidden states can be returned.
    library = importlib.import_module("transformers.modeling_utils")
    recorded = getattr(library, "_CAN_RECORD_REGISTRY", {})
    dict.__setitem__(recorded, str(kind), getattr(original, "_can_record_outputs", None))
    return kind


def __getattr__(name: str) -> type[nn.Module]:
    for family in FAMILIES.values():
        if name in _roles(family):
            return patched_class(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
