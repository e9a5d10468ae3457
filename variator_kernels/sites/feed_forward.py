"""What an FFN sublayer of a known family consists of, as a :class:`FeedForward`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor

from ..ops.feed_forward import FeedForward
from ..ops.prepacked_linear import Forward
from ..ops.transforms import tracing
from .families import FAMILIES, ROW, Family, follow, is_a, lookup
from .find import replaced
from .watch import Watch, same_tensors
from .wrappers import check_present

_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


_PROXY: Any = getattr(proxy_tensor, "_AttrProxy", None)
# The last two stand for plain weights while a program is exported, and under a fake mode.
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


class Described:
    """A sublayer's :func:`describe`, kept while nothing that it looked at has changed.

    Threads may call it at once: what is kept is replaced whole. Copies and pickles start empty.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[FeedForward, Watch, weakref.ref[nn.Module]] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def of(self, layer: nn.Module) -> FeedForward:
        """What ``layer``, always the same one, consists of now."""
        if torch.compiler.is_compiling() or tracing():  # a trace holds what is read on the way
            return describe(layer)
        kept = self._kept
        # A replica of DataParallel shares this object with the original.
        if kept is None or kept[2]() is not layer or not kept[1].holds():
            # Watched first: what changes in between is looked at again in the next call.
            watch = _watched(layer, family_of(layer))
            kept = describe(layer), watch, weakref.ref(layer)
            self._kept = kept if same_tensors(kept[0], describe(layer)) else None
        return kept[0]


def _watched(layer: nn.Module, family: Family) -> Watch:
    """Everything that :func:`describe` looks at."""
    watch = Watch()
    single = (family.container, family.w_gate, family.w_out, family.act, family.norm)
    dropouts = (family.outer_dropout, family.inner_dropout)
    paths = {*family.steps, *family.bypassed, *family.w_in, *single, *dropouts} - {""}
    ends = [watch.path(layer, path) for path in sorted(paths)]
    for module in {id(end): end for end in ends if isinstance(end, nn.Module)}.values():
        mode = ("training", "p") if hasattr(module, "p") else ()
        watch.module(module, (*mode, "approximate", "weight", "bias", *family.eps))
    watch.start()
    return watch


def describe(layer: nn.Module) -> FeedForward:
    """What the FFN sublayer ``layer`` consists of now; traceable by ``torch.compile``.

    Plain products where the weights tell all that the FFN does; otherwise (replaced, quantised,
    parametrised or hooked linear layers, an unknown activation) ``module`` is the FFN itself.

    Raises:
        TypeError: ``layer`` is not an FFN sublayer of a known family, or what the kernels replace
            (its norm, its dropout) was replaced or hooked. ValueError: accelerate offloads it.
    """
    family = family_of(layer)
    check_present(layer)
    for name in family.bypassed:
        part = follow(layer, name)
        home = type(part).forward.__module__
        if not _untouched(part) or home.split(".")[0] not in ("torch", "transformers", "apex"):
            raise TypeError(
                f"{name} of {type(layer).__name__} was replaced or hooked ({type(part).__name__}): "
                "the compressed layer would pass it by; unpatch the model to use it"
            )
    found = (lookup(layer, name) for name in family.w_in)
    w_in: Any = next((part for part in found if part is not None), None)
    w_gate = lookup(layer, family.w_gate)
    w_out = lookup(layer, family.w_out)
    activation = _activation(lookup(layer, family.act))
    sublayer = FeedForward(
        *(_stand_in(layer, family, w_out),) * 2,
        post_norm=family.post_norm,
        # A sublayer without a norm leaves the residual to its block.
        residual=bool(family.norm),
        dropout_outer=_probability(follow(layer, family.outer_dropout)),
    )
    norm = lookup(layer, family.norm)
    if norm is not None:
        sublayer = sublayer._replace(
            norm=family.norm_kind,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            eps=next(getattr(norm, name) for name in family.eps if hasattr(norm, name)),
        )
    plain = (
        _tells_all(lookup(layer, family.container), family)
        and all(_plain_linear(p) for p in (w_in, w_out))
        and (w_gate is None or _plain_linear(w_gate))
    )
    if not plain or activation is None:
        return sublayer._replace(module=_chain([follow(layer, step) for step in family.steps]))
    return sublayer._replace(
        w_in=w_in.weight,
        w_out=w_out.weight,
        w_gate=None if w_gate is None else w_gate.weight,
        b_in=w_in.bias,
        b_out=w_out.bias,
        b_gate=None if w_gate is None else w_gate.bias,
        activation=activation,
        dropout_inner=_probability(lookup(layer, family.inner_dropout)),
    )


def family_of(layer: nn.Module) -> Family:
    """The family whose FFN sublayer ``layer`` is, patched or not; TypeError if there is none."""
    patched = getattr(type(layer), ROW, None)
    if patched is not None:
        return patched
    for family in FAMILIES.values():
        if is_a(layer, family, family.layer):
            return family
    known = tuple(dict.fromkeys(family.layer for family in FAMILIES.values()))
    raise TypeError(
        f"ffn must be an FFN sublayer of a known family, {known}, or have a feed_forward(), got "
        f"{type(layer).__name__}"
    )


def _stand_in(layer: nn.Module, family: Family, w_out: Any) -> Tensor:
    """Takes the place of products that are not looked at: size, type and device are right."""
    for weight in (lookup(layer, family.norm and f"{family.norm}.weight"), lookup(w_out, "weight")):
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    return torch.empty(w_out.out_features)


def _tells_all(container: nn.Module | None, family: Family) -> bool:
    return container is None or (
        _untouched(container)
        and type(container).__name__ in family.container_classes
        and type(container).forward.__module__ == family.module
    )


def _chain(steps: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """One module, or a function that runs several in turn."""
    return steps[0] if len(steps) == 1 else functools.partial(_run, tuple(steps))


def _run(steps: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _untouched(module: nn.Module) -> bool:
    """Nobody replaced its ``forward`` or hooked it; packed products are what it is."""
    packed = isinstance(module.__dict__.get("forward"), Forward)
    return (packed or not replaced(module)) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _kind(module: nn.Module) -> type:
    """Its class, without what ``torch.export`` may put around a module that it traces."""
    kinds = type(module).__mro__
    return kinds[kinds.index(_PROXY) + 1] if _PROXY in kinds else kinds[0]


def _plain_linear(linear: nn.Module) -> bool:
    """Its weight is all it is: no subclass of either (quantised, sharded), no hook."""
    return _kind(linear) is nn.Linear and type(linear.weight) in _PLAIN and _untouched(linear)


def _probability(dropout: nn.Module | None) -> float:
    return 0.0 if dropout is None or not dropout.training else getattr(dropout, "p", 0.0)


def _activation(act: Any) -> str | None:
    """The name of a recognised activation, or None."""
    if not isinstance(act, nn.Module) or not _untouched(act):
        return None
    kind = _kind(act)
    if kind is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    ours = kind.__module__.split(".")[0] in ("torch", "transformers")
    return _ACTIVATIONS.get(kind.__name__) if ours else None
