"""The models under test: architectures, weights, plugins and inputs, all from fixed seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    DistilBertModel,
    ElectraModel,
    MT5EncoderModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    UMT5EncoderModel,
)

from variator_kernels.ops.feed_forward import FeedForward, PluginWeights
from variator_kernels.sites.find import find

from . import minilm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILT_IN: dict[str, Callable[[], PretrainedConfig]] = {
    "t5-small": T5Config,
    "t5-base": partial(T5Config, d_model=768, d_ff=3072, num_heads=12, num_layers=12),
    "t5-large": partial(T5Config, d_model=1024, d_ff=4096, num_heads=16, num_layers=24),
    "bert-base": BertConfig,
}
"""Architectures; their weights are random."""
NAMES = ("minilm", *BUILT_IN)
ENCODERS = {
    "t5": T5EncoderModel,
    "mt5": MT5EncoderModel,
    "umt5": UMT5EncoderModel,
    "bert": BertModel,
    "roberta": RobertaModel,
    "distilbert": DistilBertModel,
    "electra": ElectraModel,
}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
Weights = TypeVar("Weights", FeedForward, PluginWeights)


class Architecture(NamedTuple):
    """A configuration, and the folder of its weights if there are any."""

    name: str
    config: Any
    folder: Path | None
    tokenizer: Path | None = None

    @property
    def weights(self) -> str:
        if self.name == "minilm":
            return "pretrained"
        return "from the folder" if self.folder else "random"


def architecture(name: str) -> Architecture:
    """A built-in architecture or MiniLM by name, or a folder with config.json, perhaps weights."""
    if name in BUILT_IN:
        return Architecture(name, BUILT_IN[name](), None)
    folder = minilm.folder() if name == "minilm" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be one of {NAMES} or a folder with config.json, got {name!r}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in ENCODERS:
        raise ValueError(f"model_type must be one of {tuple(ENCODERS)}, got {config.model_type!r}")
    stored = any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    own = folder if (folder / "tokenizer_config.json").is_file() else None
    named = name if name == "minilm" else folder.resolve().name
    return Architecture(named, config, folder if stored else None, own)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cast(module: Any, dtype: torch.dtype) -> Any:
    """The dtype, with ``wo`` left in fp32 for fp16, as transformers loads T5."""
    module.to(dtype)
    for name, child in module.named_modules():
        if dtype == torch.float16 and name.endswith("wo"):
            child.to(torch.float32)
    return module.eval().requires_grad_(False)


def encoder(model: Architecture, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The encoder in a dtype; random weights are the same in every call."""
    cls = ENCODERS[model.config.model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if model.folder:
            built = cls.from_pretrained(
                model.folder,
                local_files_only=True,
                attn_implementation=attention,
                dtype=torch.float32,
            )
        else:
            model.config._attn_implementation = attention
            built = cls(model.config)
    return cast(built, dtype)


def sharing(built: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A second encoder on the same weights, with another attention implementation."""
    config = type(built.config).from_dict(built.config.to_dict())
    config._attn_implementation = attention
    with torch.device("meta"):
        twin = type(built)(config)
    twin.load_state_dict(built.state_dict(), assign=True)
    for name, buffer in built.named_buffers():
        path, _, own = name.rpartition(".")
        setattr(twin.get_submodule(path), own, buffer)  # BERT's position ids are not in the state
    return twin.eval().requires_grad_(False)


def sublayer(model: Architecture, dtype: torch.dtype) -> Any:
    """The first block's FFN sublayer; calling it runs that alone, of a BERT's block too."""
    if model.folder:
        layer = find(encoder(model, dtype)).layers[0]
    else:
        layer = cast(_random_sublayer(model.config), dtype)
    layer.forward = getattr(layer, "feed_forward_chunk", layer.forward)
    return layer


def _random_sublayer(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = 1, 8
    layer, source = find(ENCODERS[config.model_type](config)).layers[0], generator(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=source)
            else:
                parameter.normal_(0 if name.endswith("bias") else 1, 0.1, generator=source)
    return layer


def plugin(config: Any, k: int, bottleneck: int, dtype: torch.dtype) -> PluginWeights:
    """A plugin with every parameter away from zero, so that checks see every term."""
    d, source = config.hidden_size, generator(k)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=source) * shape[-1] ** -0.5).to(dtype)

    return PluginWeights(
        merge_weight=normal(k, k * d),
        merge_bias=normal(k),
        w1=normal(bottleneck, 2 * d),
        b1=normal(bottleneck),
        w2=normal(d, bottleneck),
        b2=normal(d),
    )


def widened(weights: Weights) -> Weights:
    """The same weights in float64."""
    wide = (v.detach().double() if isinstance(v, Tensor) else v for v in weights)
    return type(weights)._make(wide)


def hidden(batch: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    """Hidden states of unit scale."""
    return torch.randn(batch, length, d, generator=generator(2)).to(dtype)


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """Token ids."""
    return torch.randint(0, vocabulary, (batch, length), generator=generator(3))


def ragged_mask(batch: int, length: int) -> Tensor:
    """A right-padded batch: row lengths evenly from 32 to ``length``, shuffled."""
    lengths = torch.linspace(min(32, length), length, batch).round().long()
    lengths = lengths[torch.randperm(batch, generator=generator(4))]
    return torch.arange(length) < lengths[:, None]
