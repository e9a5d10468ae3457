"""OpenVINO's CPU plugin: fp32, bf16, and int8 by NNCF (weights and activations, SmoothQuant)."""

from pathlib import Path

import torch

from ..cases import Call
from ..harness import machine
from .source import Source, need

GRAPH = "model.xml"


def build(source: Source, dtype: str) -> Call:
    """One stream for one request, which is what its ``LATENCY`` hint means."""
    ov = need("openvino")
    path = source.kept("openvino", lambda folder: _convert(source, folder / GRAPH))
    if dtype == "int8":
        plain = path / GRAPH
        path = source.kept("openvino-int8", lambda f: _quantise(source, plain, f / GRAPH))
    # In int8, what stays in floating point.
    narrow = dtype == "bf16" or (dtype == "int8" and machine.bf16_pays())
    options = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    }  # fmt: skip
    network = ov.Core().compile_model(path / GRAPH, "CPU", options)
    return source.call(lambda ids, mask: network([ids, mask])[0])


def _convert(source: Source, path: Path) -> None:
    ov = need("openvino")
    graph = ov.convert_model(source.module, example_input=source.example)
    ov.save_model(graph, path, compress_to_fp16=False)


def _quantise(source: Source, plain: Path, path: Path) -> None:
    """Sums of two products in 16 bits saturate where there is no VNNI: half the range avoids it."""
    ov, nncf = need("openvino"), need("nncf")
    parameters = need("nncf.quantization.advanced_parameters")
    fix = parameters.OverflowFix.DISABLE if machine.has_vnni() else parameters.OverflowFix.ENABLE
    rows = [[ids.numpy(), mask.numpy()] for ids, mask in source.calibration()]
    graph = nncf.quantize(
        ov.Core().read_model(plain), nncf.Dataset(rows), subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER, target_device=nncf.TargetDevice.CPU,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )  # fmt: skip
    ov.save_model(graph, path, compress_to_fp16=False)
