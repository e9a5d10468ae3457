"""The case of one input: every runtime in every dtype, ours at every level."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ..cases import Arm, Call, Case, Key
from ..cases.encoder import PLUGIN_ARMS, Batch, Encoder
from ..cases.models import Architecture
from ..harness import machine
from ..harness.checks import QUANTISED, Truth, truth
from . import ctranslate, onnx, openvino, torchao
from .inputs import Input
from .source import Source

DTYPES = ("fp32", "bf16", "int8")
FLOATS = DTYPES[:2]
PEERS: dict[str, tuple[Callable[[Source, str], Call], tuple[str, ...]]] = {
    "openvino": (openvino.build, DTYPES),
    "onnxruntime": (onnx.build, ("fp32", "int8")),
    "ctranslate2": (ctranslate.build, ("fp32", "int8")),
    "torchao": (torchao.build, ("int8",)),
    "torchao-pt2e": (torchao.build_exported, ("int8",)),
}
"""Runtimes that are not plain PyTorch, and the dtypes that they are measured in."""
HUGGING_FACE = {"hf": ("fp32",), "hf-sdpa": FLOATS, "hf-compiled": FLOATS}
REST = 0.02
"""Seconds. libgomp's threads spin for three milliseconds, others' for about as long."""
ARMS = (*HUGGING_FACE, *PEERS, *PLUGIN_ARMS)


class Peers:
    """One model on one input.

    Args:
        calibration: rows for runtimes that need activations' ranges.
        work: folder for what they export.
    """

    def __init__(
        self, model: Architecture, given: Input, ratios: tuple[int, ...],
        placements: tuple[tuple[str, ...], ...], bottleneck: int, dtypes: Iterable[str],
        calibration: Callable[[], list[Batch]], work: Path,
    ) -> None:  # fmt: skip
        self.given, self.dtypes = given, [name for name in DTYPES if name in dtypes]
        size = (given.batch, given.length, ratios, bottleneck, placements, given.batches, "encoder")
        floats = {"fp32", *self.dtypes} - {"int8"}  # fp32 is what all are checked against
        # What stays in floating point beside int8, as OpenVINO has it too.
        self.beside_int8 = "bf16" if "int8" in self.dtypes and machine.has_bf16() else "fp32"
        floats.add(self.beside_int8)
        self.encoders = {dtype: Encoder(model, dtype, *size) for dtype in floats}
        self.wide = self.encoders["fp32"]
        self.source = Source(self.wide, work, calibration)

    def case(self, arms: Iterable[str]) -> Case:
        """Dense arms first, in each dtype that they have."""
        wide, given = self.wide, self.given
        made = Case("peers", "encoder", "forward", wide.model.name, "", given.batch, given.length,
                    self.truth, compared=wide.rows, rest=REST)  # fmt: skip
        for key in self.keys(set(arms)):
            made.arms.append(Arm(key, partial(self.build, key), wide.tokens, wide.bound(key)))
        return made

    def keys(self, arms: set[str]) -> list[Key]:
        dense = HUGGING_FACE | {name: dtypes for name, (_, dtypes) in PEERS.items()}
        padding = "ragged" if self.given.batches else "none"
        found = [
            Key(name, padding=padding, dtype=dtype)
            for name, dtypes in dense.items()
            for dtype in self.dtypes
            if name in arms and dtype in dtypes
        ]
        return found + [
            Key(name, k, padding, places, dtype)
            for k, places in self.wide.levels
            for name in PLUGIN_ARMS
            for dtype in self.dtypes
            if name in arms
        ]

    def build(self, key: Key) -> Call:
        if key.arm in PEERS:
            return PEERS[key.arm][0](self.source, key.dtype)
        dtype = self.beside_int8 if key.dtype == "int8" else key.dtype
        return self.encoders[dtype].build(key)

    def truth(self, key: Key) -> Truth:
        """float64 of the fp32 weights, of ours at the arm's level by the reference; beside it plain
        PyTorch in the arm's dtype, in int8 a bound on the relative error."""
        level = (key.k, key.placements) if key.k else None
        exact = self.wide.exact[level]
        if key.dtype == "int8":
            return Truth((exact,), (), QUANTISED)
        return truth((exact,), (self.encoders[key.dtype].plain[level],))
