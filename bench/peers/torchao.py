"""torchao's int8, weights a channel and activations dynamic, compiled and frozen.

By its two ways: tensors that are swapped in (``quantize_``), and an exported graph that is
quantised for x86 and lowered to oneDNN.
"""

from typing import Any

import torch

from ..cases import Call
from ..harness import machine
from ..harness.compiling import compiled
from .source import Source, need


def build(source: Source, dtype: str) -> Call:
    """``quantize_``."""
    quantization, module = need("torchao.quantization"), source.module
    quantization.quantize_(module, quantization.Int8DynamicActivationInt8WeightConfig())
    return _compiled(source, module)


def build_exported(source: Source, dtype: str) -> Call:
    """``X86InductorQuantizer``; without VNNI with the range that it documents for that."""
    steps = need("torchao.quantization.pt2e.quantize_pt2e")
    x86 = need("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    inputs = source.encoder.inputs
    free = [torch.export.Dim.DYNAMIC] * 2 if len(inputs) > 1 else None
    module: Any = torch.export.export(source.module, inputs[0], dynamic_shapes=[free] * 2).module()
    module.graph.eliminate_dead_code()  # BERT's pooler, on which the quantizer stumbles
    module.recompile()
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config(
            is_dynamic=True, reduce_range=not machine.has_vnni()
        )
    )
    prepared = steps.prepare_pt2e(module, quantizer)
    prepared(*inputs[0])
    return _compiled(source, steps.convert_pt2e(prepared))


def _compiled(source: Source, module: torch.nn.Module) -> Call:
    inputs = source.encoder.inputs
    graph = compiled(module, dynamic=len(inputs) > 1)
    return lambda: tuple(graph(*batch) for batch in inputs)
