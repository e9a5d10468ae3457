"""Triton's interpreter for machines without a GPU: switched on before anything imports Triton."""

from __future__ import annotations

import os
import types

import numpy as np
import torch


def enable() -> None:
    """Kernels run on the CPU from here on.

    Nothing happens where there is a GPU or no Triton, or TRITON_INTERPRET=0 asks for none.
    """
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "0":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    dot = builder.create_dot

    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        # Before 3.9 it asks NumPy for int(array of one element), which NumPy 2.4 refuses.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widened(handle):
        """bf16 lies in memory as uint16, and the interpreter's dot multiplies those integers."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    convert = interpreter._convert_float

    def convert_float(values, source, target, mode):
        """fp32 to bf16 rounds to nearest on every GPU; the interpreter cuts off."""
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    class Kept:
        """In place of what brings the language back behind a kernel."""

        def restore(self):
            """Nothing: nobody in this process compiles."""

    interpreter._patch_lang_tensor = patch_tensor
    # It would look through the language at each call of a device function: most of the time.
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: Kept()
    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
