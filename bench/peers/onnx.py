"""ONNX Runtime's CPU provider: fp32, and int8 with dynamic activations, weights a channel."""

from pathlib import Path

import torch

from ..cases import Call
from ..harness import machine
from .source import Source, need

GRAPH = "model.onnx"
NAMES = ["ids", "mask"]


def build(source: Source, dtype: str) -> Call:
    """All of the session's graph optimisations. What ``onnxruntime.transformers.optimizer`` fuses
    beyond them did not make BERT faster: it does not find the attention of today's exports."""
    ort = need("onnxruntime")
    path = source.kept("onnx", lambda folder: _export(source, folder / GRAPH))
    if dtype == "int8":
        plain = path / GRAPH
        path = source.kept("onnx-int8", lambda folder: _quantise(plain, folder / GRAPH))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path / GRAPH, options, providers=["CPUExecutionProvider"])
    return source.call(lambda *batch: session.run(None, dict(zip(NAMES, batch, strict=True)))[0])


def _export(source: Source, path: Path) -> None:
    """Traced: the runtime's fusions know the patterns of that exporter."""
    need("onnx")
    free = {name: {0: "rows", 1: "length"} for name in (*NAMES, "hidden")}
    torch.onnx.export(
        source.module, source.example, str(path), dynamo=False, opset_version=17,
        input_names=NAMES, output_names=["hidden"], dynamic_axes=free,
    )  # fmt: skip


def _quantise(plain: Path, path: Path) -> None:
    """Without VNNI with the reduced range that the runtime's documentation asks for there: sums of
    two products in 16 bits saturate otherwise."""
    quantization = need("onnxruntime.quantization")
    quantization.quantize_dynamic(
        plain, path, per_channel=True, reduce_range=not machine.has_vnni(),
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
