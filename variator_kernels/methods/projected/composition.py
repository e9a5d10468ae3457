"""The compressed weight ``W_C = P_out · W · P_in + A``, and how its gradient reaches P and A.

It is built when it is first needed, and again when P, A or W were written since, in place or by an
optimizer's step, so a forward never sees an old one, in evaluation as in training. Two ways of
training:

- By default W_C is part of the graph: each backward pass sends its gradient through the
  projections.
- Within :func:`collecting` W_C is a leaf: micro-batches add to its ``grad``, and :func:`send`
  carries the sum through the projections, once an optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from . import steps

WEIGHT = "weight"


class Composition(nn.Module):
    """``P_out · W · P_in + A``; a factor that is None is the identity.

    Args:
        frozen: W ``[out, in]``. It is no parameter: no optimiser, state dict or gradient sees it.
        p_in: ``[in, in']``. p_out: ``[out', out]``.
        stays: whether W stays on its device and in its dtype while the module moves; it is brought
            where it is needed then, once a build.
    """

    def __init__(
        self,
        frozen: Tensor,
        p_in: Tensor | None = None,
        p_out: Tensor | None = None,
        stays: bool = False,
    ) -> None:
        super().__init__()
        self.p_in = None if p_in is None else nn.Parameter(p_in)
        self.p_out = None if p_out is None else nn.Parameter(p_out)
        self.frozen = frozen.detach()
        self.stays = stays
        self.collects = False
        self._built: Tensor | None = None
        self.read: list[Tensor] = []
        """What W_C was built of."""
        self._seen: list[Any] = []
        steps.watch(self)

    def forward(self, addition: Tensor) -> Tensor:
        """W_C for ``addition`` A ``[out', in']``."""
        built = self._current(addition)
        if not torch.is_grad_enabled():
            return built.detach()
        if self.collects:
            return built.requires_grad_(True)
        return _Compose.apply(built, self.frozen, self.p_out, self.p_in, addition)  # type: ignore

    def _current(self, addition: Tensor) -> Tensor:
        read = [t for t in (self.p_out, self.p_in, addition, self.frozen) if t is not None]
        # Devices and dtypes come and go with new storages; counters tell writes in place. The
        # tensors themselves are held, so that no other can take their place unseen.
        seen = [(t.data_ptr(), t._version, t.dtype) for t in read]
        if self._built is None or seen != self._seen or not all(map(is_, read, self.read)):
            self._unsent()
            self._built = self.fresh(addition)
            self.read, self._seen = read, seen
        return self._built

    def fresh(self, addition: Tensor) -> Tensor:
        """W_C of the factors as they are now, without gradients, whoever wrote them how."""
        with torch.inference_mode(False), torch.no_grad():
            return compose(self.frozen, self.p_out, self.p_in, addition)

    def _unsent(self) -> None:
        if self._built is not None and self._built.grad is not None:
            raise RuntimeError(
                "P or A were written while W_C holds a gradient that was not sent to them: call "
                "send(model) before the optimizer's step"
            )

    def send(self, addition: Tensor) -> None:
        """Add what W_C's gradient means for P and A to theirs, and drop it."""
        built = self._built
        if built is None or built.grad is None:
            return
        wanted = [p is not None and p.requires_grad for p in (self.p_out, self.p_in, addition)]
        with torch.no_grad():
            found = gradients(built.grad, self.frozen, self.p_out, self.p_in, wanted)
        for parameter, gradient in zip((self.p_out, self.p_in, addition), found, strict=True):
            if parameter is not None and gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient
        built.grad = None

    def forget(self) -> None:
        """Drop W_C; the next forward builds it anew."""
        self._unsent()
        self._drop()

    def _drop(self) -> None:
        self._built, self.read, self._seen = None, [], []

    def train(self, mode: bool = True) -> Composition:
        # What is written through .data outside a step is not counted; each mode begins anew.
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Composition:
        self.forget()
        if not self.stays:
            self.frozen = fn(self.frozen)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None, "read": [], "_seen": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        steps.watch(self)  # a copy, or unpickled

    def extra_repr(self) -> str:
        return f"frozen={list(self.frozen.shape)}, stays={self.stays}"


def compose(frozen: Tensor, p_out: Tensor | None, p_in: Tensor | None, addition: Tensor) -> Tensor:
    """``P_out · W · P_in + A`` in A's dtype and on its device, the cheaper product first."""
    weight = frozen.to(addition.device, addition.dtype)
    if p_out is not None and p_in is not None:
        product = (p_out @ weight) @ p_in if _left_first(p_out, p_in) else p_out @ (weight @ p_in)
    else:
        product = weight if p_out is None else p_out @ weight
        product = product if p_in is None else product @ p_in
    return product + addition


def gradients(
    upstream: Tensor,
    frozen: Tensor,
    p_out: Tensor | None,
    p_in: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of P_out, P_in and A, for ``upstream`` G, the gradient of W_C (``DESIGN``: section 2)."""
    weight = frozen.to(upstream.device, upstream.dtype)
    d_out = d_in = None
    if wanted[0]:
        d_out = upstream @ (weight if p_in is None else weight @ p_in).mT
    if wanted[1]:
        d_in = (weight if p_out is None else p_out @ weight).mT @ upstream
    return d_out, d_in, (upstream.clone() if wanted[2] else None)


def _left_first(p_out: Tensor, p_in: Tensor) -> bool:
    (small_out, out), (inside, small_in) = p_out.shape, p_in.shape
    left = small_out * out * inside + small_out * inside * small_in
    return left <= out * inside * small_in + small_out * out * small_in


class _Compose(torch.autograd.Function):
    """W_C that was built already, with the gradients of its factors."""

    @staticmethod
    def forward(
        ctx: Any,
        built: Tensor,
        frozen: Tensor,
        p_out: Tensor | None,
        p_in: Tensor | None,
        addition: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(p_out, p_in)
        ctx.frozen = frozen
        return built.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        p_out, p_in = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        return None, None, *gradients(upstream, ctx.frozen, p_out, p_in, wanted)


def attach(module: nn.Module, composition: Composition, addition: Tensor) -> None:
    """Have ``module.weight`` be W_C. Its parameter becomes A: ``parametrizations.weight.original``.

    The class of ``module`` stays the base of its new one, so that its ``forward`` is unchanged.
    """
    weight: Any = module.weight
    module.weight = nn.Parameter(addition, requires_grad=weight.requires_grad)
    # unsafe: W_C is no function of A alone, there is nothing for PyTorch to check.
    parametrize.register_parametrization(module, WEIGHT, composition, unsafe=True)


def share(module: nn.Module, other: nn.Module) -> None:
    """Have ``module.weight`` be the W_C of ``other``: one P, one A, one W_C."""
    attach(module, composition_of(other), addition_of(other).detach())
    table: Any = module.parametrizations
    table[WEIGHT] = other.parametrizations[WEIGHT]  # type: ignore[index]


def is_composed(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, WEIGHT) and isinstance(
        module.parametrizations[WEIGHT][0],  # type: ignore[index]
        Composition,
    )


def composition_of(module: nn.Module) -> Composition:
    return module.parametrizations[WEIGHT][0]  # type: ignore[index, return-value]


def addition_of(module: nn.Module) -> nn.Parameter:
    return module.parametrizations[WEIGHT].original  # type: ignore


def composed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` whose weight is a W_C, by name; those that share one, once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if is_composed(module) and id(composition_of(module)) not in seen:
            seen.add(id(composition_of(module)))
            yield name, module


@contextmanager
def collecting(model: nn.Module) -> Iterator[None]:
    """In the block, backward passes leave their gradients at W_C; :func:`send` carries them on.

    Raises:
        RuntimeError: gradients that were not sent are left at the end.
    """
    parts = [composition_of(module) for _, module in composed(model)]
    before = [part.collects for part in parts]
    for part in parts:
        part.forget()
        part.collects = True
    try:
        yield
        for part in parts:
            part.forget()
    finally:
        for part, collects in zip(parts, before, strict=True):
            part.collects = collects
            part._drop()


def send(model: nn.Module) -> None:
    """Carry the gradients that W_C of every module collected to P and A, and add them there."""
    for _, module in composed(model):
        composition_of(module).send(addition_of(module))
