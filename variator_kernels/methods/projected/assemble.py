"""The small model: one of the same class, whose matrices are composed of the original's."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...sites.residual import Layout
from . import composition
from .composition import Composition
from .sizes import Sizes, narrowed


class Factors(NamedTuple):
    """What a matrix is composed of at the start; None: the identity, zero."""

    p_in: Tensor | None = None
    p_out: Tensor | None = None
    addition: Tensor | None = None


class Builder:
    """Gives the small model its parameters, one after another.

    ``model`` is only read. ``small`` has random values where a role says that sizes change, until
    :meth:`matrix` and :meth:`vector` set them, and copies elsewhere.
    """

    def __init__(self, model: Any, layout: Layout, sizes: Sizes, untied: bool) -> None:
        self.model, self.layout, self.untied = model, layout, untied
        self.small = skeleton(model, layout, sizes, untied)
        self.originals = dict(model.named_parameters(remove_duplicate=False))
        self.modules = dict(self.small.named_modules(remove_duplicate=False))
        self.left = set(layout.roles)
        """The parameters that have no values yet."""

    def matrix(self, name: str, factors: Factors) -> None:
        """``name.weight``, and of every module that shares it."""
        module, frozen = self.modules[name], self.originals[f"{name}.weight"]
        self.left.discard(f"{name}.weight")
        place: Any = module.weight
        if factors.p_in is None and factors.p_out is None:
            value = frozen if factors.addition is None else frozen + factors.addition
            module.weight = nn.Parameter(value.detach().to(place.dtype, copy=True))
        else:
            made = [
                # Copies: matrices start with the same P, but each trains its own.
                None if p is None else p.to(place.device, place.dtype, copy=True).contiguous()
                for p in factors
            ]
            zero = torch.zeros_like(place) if made[2] is None else made[2]
            composition.attach(module, Composition(frozen, made[0], made[1]), zero)
        for other in self._sharing(name):
            self.left.discard(f"{other}.weight")
            if self.modules[other] is module:
                continue
            if composition.is_composed(module):
                composition.share(self.modules[other], module)
            else:
                self.modules[other].weight = module.weight

    def vector(self, name: str, value: Tensor) -> None:
        """A gain or a bias, by its full name."""
        path, _, leaf = name.rpartition(".")
        parameter: Any = getattr(self.modules[path], leaf)
        with torch.no_grad():
            parameter.copy_(value)
        self.left.discard(name)

    def bias(self, name: str, p_out: Tensor | None) -> None:
        """The bias of a linear layer, if it has one, on its reduced outputs."""
        full = f"{name}.bias"
        if full in self.layout.roles:
            value = self.originals[full].double()
            self.vector(full, value if p_out is None else p_out.double() @ value)

    def gain(self, norm: str) -> Tensor:
        """What the original's norm multiplies by, ``[d]`` in float64."""
        return self.originals[f"{norm}.weight"].detach().double() + self._offset

    def set_gain(self, norm: str, gain: Tensor) -> None:
        self.vector(f"{norm}.weight", gain - self._offset)

    @property
    def _offset(self) -> float:
        row = self.layout.residual
        return 0.0 if row is None else row.gain_offset

    def _sharing(self, name: str) -> tuple[str, ...]:
        names = self.layout.embeddings
        if self.layout.tied and not self.untied:
            names = (*names, self.layout.head)
        return tuple(other for other in names if other != name) if name in names else ()

    def finish(self) -> Any:
        assert not self.left, self.left
        return self.small.train(self.model.training)


def skeleton(model: Any, layout: Layout, sizes: Sizes, untied: bool) -> Any:
    """A model of the same class at these sizes, without the original's values where they change.

    Raises:
        ValueError: the class makes other parameters than the layout says.
    """
    config = narrowed(model, layout, sizes)
    if untied:
        config.tie_word_embeddings = False
    small = plain(model, config)
    share_alike(model, small, apart=f"{layout.head}.weight" if untied else "")
    originals = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in small.named_parameters():
        if name in originals:  # a T5 in fp16 has some in fp32
            parameter.data = parameter.data.to(originals[name].dtype)
    found = dict(small.named_parameters(remove_duplicate=False))
    if found.keys() != originals.keys():
        raise ValueError(
            f"model's {type(model).__name__} must have the parameters that its class makes, of its "
            f"own or missing: {sorted(found.keys() ^ originals.keys())[:3]}"
        )
    with torch.no_grad():
        for name, value in originals.items():
            if name in layout.roles:
                continue
            if found[name].shape != value.shape:
                raise ValueError(
                    f"model's {name} must keep its shape {tuple(value.shape)} at hidden size "
                    f"{sizes.hidden}, it would have {tuple(found[name].shape)}: projection does "
                    "not know it"
                )
            found[name].copy_(value)
        copy_buffers(model, small)
    return small


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Those that are saved; others are made by the class."""
    saved, own = source.state_dict(), dict(source.named_buffers())
    for name, value in target.named_buffers():
        if name in saved and name in own:
            value.copy_(own[name])


def plain(model: Any, config: Any) -> Any:
    """A fresh model of the class of ``model``, on its device and in its dtype, in evaluation; the
    caller's random numbers stay as they are."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    # As from_pretrained does: constants that are buffers are rounded to this dtype, once.
    default = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            made = type(model)(config)
    finally:
        torch.set_default_dtype(default)
    made.to(weight.device)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def share_alike(source: nn.Module, target: nn.Module, apart: str = "") -> None:
    """Parameters of ``target`` are one where those of ``source`` are, and nowhere else, whatever
    its class ties. ``apart``: the name of one that is its own."""
    parts = dict(target.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, module in source.named_modules(remove_duplicate=False):
        if name not in parts:
            continue  # what holds P and A
        own = {key: id(value) for key, value in module._parameters.items() if value is not None}
        if composition.is_composed(module):
            own[composition.WEIGHT] = id(composition.addition_of(module))
        for key, identity in own.items():
            full = f"{name}.{key}" if name else key
            names.setdefault(-1 if full == apart else identity, []).append(full)
    taken: set[int] = set()
    for first, *others in names.values():
        place, _, leaf = first.rpartition(".")
        parameter = parts[place]._parameters.get(leaf)
        if parameter is None:
            continue
        if id(parameter) in taken:
            parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            parts[place]._parameters[leaf] = parameter
        taken.add(id(parameter))
        for other in others:
            place, _, leaf = other.rpartition(".")
            parts[place]._parameters[leaf] = parameter
