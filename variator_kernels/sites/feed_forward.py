"""What an FFN sublayer of a known family consists of, as a :class:`FeedForward`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.feed_forward import FeedForward
from ..ops.transforms import tracing
from .described import Described, memory_of
from .families import FAMILIES
from .family import ORIGINAL, ROW, Family, follow, is_a, lookup
from .plain import activation_name, kind_of, plain_linear, untouched
from .quantised import stored_products, watch_stored
from .watch import Watch
from .wrappers import check_present


class DescribedFeedForward(Described[FeedForward]):
    """An FFN sublayer's :func:`describe`."""

    __slots__ = ()

    @staticmethod
    def describe(layer: nn.Module) -> FeedForward:
        return describe(layer)

    @staticmethod
    def watched(layer: nn.Module) -> Watch:
        return _watched(layer, family_of(layer))

    @staticmethod
    def memory(layer: nn.Module) -> tuple[Any, ...] | None:
        family = family_of(layer)
        weight = lookup(layer, f"{family.w_in[0]}.weight") if family.fused else None
        return memory_of(weight) if isinstance(weight, Tensor) else None


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
        watch_stored(watch, module)
    watch.entries(vars(layer), ("training",))
    watch.start()
    return watch


def describe(layer: nn.Module, family: Family | None = None) -> FeedForward:
    """What the FFN sublayer ``layer`` consists of now; traceable by ``torch.compile``.

    Plain products where the weights tell all that the FFN does; otherwise (replaced, quantised,
    parametrised or hooked linear layers, an unknown activation) ``module`` is the FFN itself.
    ``family`` is the sublayer's: by default the one it is patched by, else the table's.

    Raises:
        TypeError: ``layer`` is not an FFN sublayer of a known family, or what the kernels replace
            (its norm, its dropout) was replaced or hooked. ValueError: accelerate offloads it.
    """
    family = family_of(layer) if family is None else family
    check_present(layer)
    check_bypassed(layer, family.bypassed, family.module)
    check_norm(layer, family.norm, family.norm_kind, family.norm_class)
    found = (lookup(layer, name) for name in family.w_in)
    w_in: Any = next((part for part in found if part is not None), None)
    w_gate = lookup(layer, family.w_gate)
    w_out = lookup(layer, family.w_out)
    activation = family.activation or activation_name(lookup(layer, family.act))
    sublayer = FeedForward(
        *(_stand_in(layer, family, w_out),) * 2,
        post_norm=family.post_norm,
        # A sublayer without a norm mostly leaves the residual to its block.
        residual=family.adds,
        dropout_outer=probability(layer, family.outer_dropout),
    )
    norm = lookup(layer, family.norm)
    if norm is not None:
        sublayer = sublayer._replace(
            norm=family.norm_kind,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            eps=epsilon(norm, family.eps),
        )
    plain = (
        _tells_all(lookup(layer, family.container), family)
        and all(plain_linear(p) for p in (w_in, w_out))
        and (w_gate is None or plain_linear(w_gate))
        and _plain_dropout(layer, family)
    )
    if not plain or activation is None:
        stored = _stored(layer, family, sublayer._replace(activation=activation or ""))
        return sublayer._replace(module=_whole(layer, family), stored=stored)
    if family.fused:
        weights, biases = _halves(w_in.weight, family), _halves(w_in.bias, family)
    elif w_gate is None:
        weights, biases = (w_in.weight, None), (w_in.bias, None)
    else:
        weights, biases = (w_in.weight, w_gate.weight), (w_in.bias, w_gate.bias)
    return sublayer._replace(
        w_in=weights[0],
        w_out=w_out.weight,
        w_gate=weights[1],
        b_in=biases[0],
        b_out=w_out.bias,
        b_gate=biases[1],
        activation=activation,
        dropout_inner=probability(layer, family.inner_dropout),
    )


def _stored(layer: nn.Module, family: Family, sublayer: FeedForward) -> FeedForward | None:
    """The sublayer by its weights, where all of them came in int8; None in training, too."""
    if layer.training or torch.compiler.is_compiling() or tracing() or not sublayer.activation:
        return None
    linears = products_of(layer, family)
    products = stored_products(linears)
    drops = sublayer.dropout_outer > 0 or probability(layer, family.inner_dropout) > 0
    whole = _tells_all(lookup(layer, family.container), family) and not drops
    whole = whole and _plain_dropout(layer, family)
    if isinstance(products, str) or not whole:
        return None
    first, out = products[0], products[-1]
    gate = products[1] if len(products) == 3 else None
    if family.fused:
        inner = len(first.weight.numbers) // 2
        first, gate = first.part(0, inner), first.part(inner, 2 * inner)
        if family.fused == "gate_in":
            first, gate = gate, first
    return sublayer._replace(
        w_in=first.weight.numbers,
        w_out=out.weight.numbers,
        w_gate=None if gate is None else gate.weight.numbers,
        b_in=first.bias,
        b_out=out.bias,
        b_gate=None if gate is None else gate.bias,
        scales=(
            first.weight.scales,
            out.weight.scales,
            None if gate is None else gate.weight.scales,
        ),
        precision="int8" if out.weight.dynamic else None,
    )


def products_of(layer: nn.Module, family: Family) -> list[Any]:
    """The modules of an FFN sublayer's products: the first, the gate's if it has one, the last."""
    paths = (*family.w_in, family.w_gate, family.w_out)
    return [part for path in paths if (part := lookup(layer, path)) is not None]


def check_bypassed(layer: nn.Module, names: tuple[str, ...], module: str) -> None:
    """What the kernels replace does no more than they do.

    Raises:
        TypeError: somebody replaced or hooked one of ``names``.
    """
    for name in names:
        part = follow(layer, name)
        home = type(part).forward.__module__
        homes = ("torch", "transformers", "apex", module.split(".")[0])
        if not untouched(part) or home.split(".")[0] not in homes:
            raise TypeError(
                f"{name} of {type(layer).__name__} was replaced or hooked ({type(part).__name__}): "
                "the compressed layer would pass it by; unpatch the model to use it"
            )


_NORMS = {"layer": ("LayerNorm", "FusedLayerNorm"), "rms": ("RMSNorm", "FusedRMSNorm")}
"""Classes of PyTorch and apex that compute what the kernels do, by kind."""


def check_norm(layer: nn.Module, path: str, kind: str, own: str) -> None:
    """A norm, whose weight and epsilon the kernels take, is of the ``kind`` that they compute.

    ``own``: the family's class of norms. Each is known by its class's name; that its ``forward`` is
    no other, :func:`check_bypassed` sees.

    Raises:
        TypeError: it is another.
    """
    part = lookup(layer, path)
    if part is None:
        return
    known = (own, *_NORMS[kind])
    named = any(base.__name__ in known for base in type(part).__mro__)
    if not named or getattr(part, "weight", None) is None:
        raise TypeError(
            f"{path} of {type(layer).__name__} was replaced by a {type(part).__name__}: the "
            f"compressed layer computes a {own}; unpatch the model to use it"
        )


def epsilon(norm: Any, names: tuple[str, ...]) -> float:
    """Of a norm: the first of these attributes that is there."""
    found = next(getattr(norm, name) for name in names if hasattr(norm, name))
    if found is not None:
        return found
    # What PyTorch's RMSNorm does where it is given none.
    return torch.finfo(torch.promote_types(norm.weight.dtype, torch.float32)).eps


def family_of(layer: nn.Module) -> Family:
    """The family whose FFN sublayer ``layer`` is, patched or not; TypeError if there is none."""
    patched = getattr(type(layer), ROW, None)
    if patched is not None:
        return patched
    for family in FAMILIES.values():
        if is_a(layer, family, family.layer):
            return family
    raise TypeError(
        "ffn must be an FFN sublayer of a known family (docs/families.md), or have a "
        f"feed_forward(), got {type(layer).__name__}"
    )


def _stand_in(layer: nn.Module, family: Family, w_out: Any) -> Tensor:
    """Takes the place of products that are not looked at: size, type and device are right."""
    for weight in (lookup(layer, family.norm and f"{family.norm}.weight"), lookup(w_out, "weight")):
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    if torch.compiler.is_compiling() or tracing():
        return torch.empty(w_out.out_features)
    return _empty.setdefault(w_out, torch.empty(w_out.out_features))


_empty: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""Kept: a description with another tensor would count as another."""


def _halves(both: Any, family: Family) -> tuple[Any, Any]:
    """The parts of ``w_in`` and gate in one matrix ``[2f, d]`` or bias ``[2f]``: views of it."""
    if both is None:
        return None, None
    inner = both.shape[0] // 2
    first, second = both[:inner], both[inner:]
    return (first, second) if family.fused == "in_gate" else (second, first)


def _tells_all(container: nn.Module | None, family: Family) -> bool:
    return container is None or (
        untouched(container)
        and type(container).__name__ in family.container_classes
        and type(container).forward.__module__ == family.module
    )


def _whole(layer: nn.Module, family: Family) -> Callable[[Tensor], Tensor]:
    """The FFN as it runs without plugins, up to the dropout behind it."""
    if not family.steps:
        return functools.partial(getattr(type(layer), ORIGINAL, type(layer)).forward, layer)
    steps: list[Callable[[Tensor], Tensor]] = [follow(layer, step) for step in family.steps]
    if len(steps) == 1:
        return steps[0]
    inner = probability(layer, family.inner_dropout)
    if inner > 0:
        steps.insert(-1, functools.partial(F.dropout, p=inner))
    return functools.partial(_run, tuple(steps))


def _run(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _plain_dropout(layer: nn.Module, family: Family) -> bool:
    """Whether the inner dropout does nothing outside of training: it is a number, or a module that
    nobody changed."""
    dropout = lookup(layer, family.inner_dropout)
    if not isinstance(dropout, nn.Module):
        return True
    kind: Any = kind_of(dropout)
    home = kind.forward.__module__.split(".")[0]
    return untouched(dropout) and home in ("torch", "transformers", family.module.split(".")[0])


def probability(layer: nn.Module, path: str) -> float:
    """Of a dropout module, or of a number that a block has; 0 outside of training."""
    dropout = lookup(layer, path)
    if isinstance(dropout, int | float):
        return float(dropout) if layer.training else 0.0
    return 0.0 if dropout is None or not dropout.training else getattr(dropout, "p", 0.0)
