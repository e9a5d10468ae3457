"""CTranslate2: fp32 and int8 (weights a channel, activations a row)."""

import json
import os
import subprocess
import sys
import tempfile
import weakref
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cases import Call
from ..harness import allocator
from ..harness.compiling import Unavailable
from .source import Source, need

COMPUTE = {"fp32": "float32", "int8": "int8"}


def build(source: Source, dtype: str) -> Call:
    """Weights are quantised when they are loaded."""
    need("ctranslate2")
    path = source.kept("ctranslate2", lambda folder: _write(source, folder))
    inputs: dict[str, Any] = {}
    for i, (ids, mask) in enumerate(source.encoder.inputs):
        inputs |= {f"ids{i}": ids.int().numpy(), f"lengths{i}": mask.sum(-1).int().numpy()}
    return _Apart(str(path), COMPUTE[dtype], inputs)


class _Apart:
    """The encoder in a process of its own (``ctranslate_apart.py`` says why), which ends with it.
    A call takes a tenth of a millisecond more than the runtime itself."""

    def __init__(self, path: str, compute_type: str, inputs: dict[str, Any]) -> None:
        script = Path(__file__).with_name("ctranslate_apart.py")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "inputs.npz"
            np.savez(file, **inputs)
            threads = str(torch.get_num_threads())
            paths = os.pathsep.join(filter(None, sys.path))
            self.process = subprocess.Popen(
                [sys.executable, str(script), path, compute_type, threads, str(file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | allocator.environment() | {"PYTHONPATH": paths},
            )  # fmt: skip
            named = json.loads(self._answer())
        self.blocks = [(SharedMemory(name), shape) for name, shape in named]
        self.end = weakref.finalize(self, _stop, self.process, [block for block, _ in self.blocks])

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, error = self.process.communicate()
            raise RuntimeError((error.strip().splitlines() or ["ended without an answer"])[-1])
        return line

    def __call__(self) -> tuple[torch.Tensor, ...]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()
        return tuple(
            torch.from_numpy(np.ndarray(shape, np.float32, block.buf).copy())
            for block, shape in self.blocks
        )


def _stop(process: subprocess.Popen[str], blocks: list[SharedMemory]) -> None:
    process.communicate()  # closes what it reads
    for block in blocks:
        block.close()


def _write(source: Source, folder: Path) -> None:
    """By the library's own loaders; of T5's, which expects a decoder too, the part for a stack."""
    specs = need("ctranslate2.specs.transformer_spec")
    loaders = need("ctranslate2.converters.transformers")
    model: Any = source.module.model
    config: Any = model.config
    if config.model_type == "t5":
        sizes = (config.num_layers, config.num_heads)
        activation = loaders._SUPPORTED_ACTIVATIONS[config.dense_act_fn]
        spec = specs.TransformerEncoderModelSpec(
            specs.TransformerEncoderSpec(
                *sizes, pre_norm=True, activation=activation, ffn_glu=config.is_gated_act,
                relative_attention_bias=True, rms_norm=True,
            )
        )  # fmt: skip
        loaders.T5Loader().set_stack(spec.encoder, model.encoder)
        spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    elif config.model_type == "bert":
        config.position_embedding_type = "absolute"  # newer transformers know no other
        spec = loaders.BertLoader().get_model_spec(model)
        spec.config.layer_norm_epsilon = config.layer_norm_eps
    else:
        raise Unavailable(f"ctranslate2: t5 and bert only, got {config.model_type}")
    # Ids go in: no token is ever looked up.
    spec.register_vocabulary([f"token {i}" for i in range(config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "token 0"
    spec.validate()
    spec.save(str(folder))
