"""CTranslate2: fp32 and int8 (weights a channel, activations a row)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cases import Call
from ..harness.compiling import Unavailable
from .source import Source, need

COMPUTE = {"fp32": "float32", "int8": "int8"}


def build(source: Source, dtype: str) -> Call:
    """Weights are quantised when they are loaded."""
    ct = need("ctranslate2")
    path = source.kept("ctranslate2", lambda folder: _write(source, folder))
    encoder = ct.Encoder(str(path), "cpu", compute_type=COMPUTE[dtype], inter_threads=1,
                         intra_threads=torch.get_num_threads())  # fmt: skip
    inputs = [
        (ct.StorageView.from_array(ids.int().numpy()),
         ct.StorageView.from_array(mask.sum(-1).int().numpy()))
        for ids, mask in source.encoder.inputs
    ]  # fmt: skip

    def run(ids: Any, lengths: Any) -> Any:
        return torch.from_numpy(np.asarray(encoder.forward_batch(ids, lengths).last_hidden_state))

    return lambda: tuple(run(*batch) for batch in inputs)


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
