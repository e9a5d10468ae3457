"""torch.compile for arms: one static graph an arm, weights frozen in where there is no backward."""

import itertools
import os
import shutil
import types
from typing import Any

import torch
from torch import nn

_serial = itertools.count()


class Unavailable(Exception):
    """An arm that cannot run on this machine; the message says why."""


class _Entry(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def compiled(
    module: nn.Module, *, freeze: bool = True, whole: bool = False, mode: str | None = None,
    dynamic: bool = False,
) -> Any:  # fmt: skip
    """The compiled module. Compilation happens in the first call.

    ``freeze``: weights become constants (on the CPU, without a backward pass).
    ``whole``: a graph that breaks is an error, not a slower measurement.
    ``dynamic``: one graph for inputs of many sizes.

    Dynamo keeps its graphs by code object; an entry of its own keeps arms of one class from
    recompiling, or going dynamic, because of each other.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise Unavailable("torch.compile needs a C++ compiler")
    code = _Entry.forward.__code__.replace(co_name=f"forward_{next(_serial)}")
    forward = types.FunctionType(code, _Entry.forward.__globals__)
    entry = type("Entry", (_Entry,), {"forward": forward})(module)
    graph = torch.compile(entry, dynamic=dynamic, fullgraph=whole, mode=mode)
    if not freeze:
        return graph

    compiles = True

    def call(*inputs: Any) -> Any:
        nonlocal compiles
        if not compiles:
            return graph(*inputs)
        compiles = dynamic  # then a later size may bring another graph
        with torch._inductor.config.patch(freezing=True):
            return graph(*inputs)

    return call
