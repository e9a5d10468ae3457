"""What may stand between an op and memory: compilers, tracers, exporters, function transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

exporting = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether ``torch.export`` runs; PyTorch 2.6 does not tell."""
_TELLS = hasattr(torch.compiler, "is_exporting")
_DERIVING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def tracing() -> bool:
    """Whether ``torch.jit.trace``, or ONNX's exporter on top of it, records what runs."""
    return torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs in this thread, or forward-mode derivatives."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is memory, and what is made now will be: nothing stands in between, not even a
    sign that is still to be applied."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not tracing()
        and _get_current_dispatch_mode() is None
        and not _functorch.is_functorch_wrapped_tensor(x)
        and not x.is_neg()
    )


def graphing() -> bool:
    """Whether ``torch.compile`` makes a graph of what runs, for this process alone: a registered op
    may stand there for code that reads memory. No exporter runs; where PyTorch does not tell (2.6),
    one may."""
    if not (_TELLS and torch.compiler.is_compiling()):
        return False
    return not (exporting() or torch.onnx.is_in_onnx_export())


def nobody_changes() -> bool:
    """Whether nobody (compiler, mode, transform) has a say in what runs now."""
    return not (
        torch.compiler.is_compiling()
        or tracing()
        or transformed()
        or _get_current_dispatch_mode() is not None
        or torch._C._len_torch_function_stack() > 0
    )


def nobody_between() -> bool:
    """Whether nobody (compiler, mode, transform, profiler) looks on at what runs now."""
    return nobody_changes() and not torch.autograd._profiler_enabled()


def of_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all tensors are memory, and none asks for a gradient."""
    derives = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (
            type(x) not in (Tensor, torch.nn.Parameter)
            or (derives and x.requires_grad)
            or x.is_meta
            or x.is_neg()  # these three hold other numbers than their memory
            or x._is_zerotensor()
            or _functorch.is_functorch_wrapped_tensor(x)
        ):
            return False
    return True


def nothing_between(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a kernel may be called as it is, and not as a registered op: all tensors are memory,
    none asks for a gradient, and nobody looks on."""
    return nobody_between() and of_memory(tensors)


def has_values(x: Tensor) -> bool:
    """Whether code may look at what ``x`` holds, and go this way or that."""
    return not (
        torch.compiler.is_compiling()
        or tracing()
        or x.is_meta
        or isinstance(x, FakeTensor)
        or _functorch.is_functorch_wrapped_tensor(x)
    )


def fitting(asked: str, chosen: str) -> str:
    """The backend for an op as things stand: ``chosen``, or the reference in its place.

    ONNX knows plain operations alone. The kernels have neither forward-mode derivatives nor rules
    for ``torch.func``; there ``"auto"`` (``asked``) stands for the reference.

    Raises:
        ValueError: another backend was asked for by name, under ``torch.func.grad``, ``jvp`` or
            what is built on them.
    """
    if chosen == "reference":
        return chosen
    if (torch.compiler.is_compiling() or tracing()) and torch.onnx.is_in_onnx_export():
        return "reference"
    if not transformed():
        return chosen
    if asked == "auto":
        return "reference"
    if torch._C._are_functorch_transforms_active() and _derives():
        raise ValueError(
            f"backend {asked!r} cannot run under torch.func.grad, jvp and what is built on them; "
            "use backend='auto' or 'reference'"
        )
    return chosen


def _derives() -> bool:
    """Whether one of the transforms is a derivative; vmap alone runs a kernel row by row."""
    if torch.compiler.is_compiling():
        return True
    stack = _functorch.get_interpreter_stack() or ()
    return any(level.key() in _DERIVING for level in stack)


def refuse_transforms(arguments: Iterable[Any]) -> None:
    """Called where autograd meets a registered op: PyTorch would drop the tangents of
    ``arguments``, and says nothing that helps where ``torch.func.grad`` follows one of them.

    Raises:
        RuntimeError: a derivative is asked for that the kernels do not have.
    """
    following = torch._C._are_functorch_transforms_active()
    if not (following or forward_ad._current_level >= 0):
        return
    for value in arguments:
        if isinstance(value, Tensor) and (
            _has_tangent(value) or (following and value.requires_grad)
        ):
            raise RuntimeError(
                "the kernels know no torch.func.grad, no torch.func.jvp and no other forward-mode "
                "derivative; use backend='auto' or 'reference'"
            )


def _has_tangent(value: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    try:
        return forward_ad.unpack_dual(value).tangent is not None
    except RuntimeError:  # inference mode, or compiled code: nothing there has one
        return False
