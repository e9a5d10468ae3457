"""The FFN sublayers under test: Hugging Face's module, the same as weights, a plugin, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig, T5Config
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerFF

from variator_kernels.flops import decompress_macs, ffn_macs, merge_macs
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights
from variator_kernels.sites.feed_forward import describe

BOTTLENECK = 64


class Llama(nn.Module):
    """LLaMA's FFN sublayer, norm to residual, of Hugging Face's modules."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=d, intermediate_size=f)
        self.norm, self.mlp = LlamaRMSNorm(d, config.rms_norm_eps), LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))

    def feed_forward(self) -> FeedForward:
        up, gate, down = self.mlp.up_proj, self.mlp.gate_proj, self.mlp.down_proj
        return FeedForward(
            gate.weight,
            down.weight,
            w_gate=up.weight,
            activation="silu",
            norm="rms",
            norm_weight=self.norm.weight,
            eps=self.norm.variance_epsilon,
        )


class Bert(nn.Module):
    """BERT's ``feed_forward_chunk``, of Hugging Face's modules."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        config = BertConfig(hidden_size=d, intermediate_size=f)
        self.intermediate, self.output = BertIntermediate(config), BertOutput(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)

    def feed_forward(self) -> FeedForward:
        first, second, norm = self.intermediate.dense, self.output.dense, self.output.LayerNorm
        return FeedForward(
            first.weight,
            second.weight,
            b_in=first.bias,
            b_out=second.bias,
            activation="gelu",
            norm="layer",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            post_norm=True,
        )


class T5(nn.Module):
    """T5's FFN sublayer."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.layer = T5LayerFF(T5Config(d_model=d, d_ff=f))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def feed_forward(self) -> FeedForward:
        return describe(self.layer)


class Model(NamedTuple):
    """A sublayer's family and size."""

    family: Callable[[int, int], nn.Module]
    d: int
    f: int
    gated: bool = False


MODELS = {
    "t5-base": Model(T5, 768, 3072),
    "t5-large": Model(T5, 1024, 4096),
    "bert-base": Model(Bert, 768, 3072),
    "llama-7b": Model(Llama, 4096, 11008, gated=True),
}


class Sublayer:
    """One sublayer with random weights and an input, on one device in one dtype."""

    def __init__(
        self, model: Model, batch: int, length: int, device: str, dtype: torch.dtype
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.source = torch.Generator(device).manual_seed(1)
        self.dense = model.family(model.d, model.f).to(device, dtype).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in self.dense.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=self.source)
                else:
                    parameter.normal_(1, 0.1, generator=self.source)
        described: Any = self.dense
        self.ffn: FeedForward = described.feed_forward()
        self.x = self._random(batch, length, model.d, scale=1.0)

    def _random(self, *shape: int, scale: float | None = None) -> Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        made = torch.randn(*shape, generator=self.source, device=self.device)
        return (made * scale).to(self.dtype)

    def plugin(self, k: int) -> PluginWeights:
        """Every parameter away from zero, so that checks see every term."""
        d, r = self.model.d, BOTTLENECK
        shapes = [(k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)]
        made: Any = [self._random(*shape) for shape in shapes]
        return PluginWeights(*made)

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def macs(self, k: int | None) -> int:
        """Multiply-adds: dense, or at ratio k."""
        d, f, gated = self.model.d, self.model.f, self.model.gated
        if k is None:
            return self.tokens * ffn_macs(d, f, gated)
        groups = self.x.shape[0] * -(-self.x.shape[1] // k)
        plugin = merge_macs(self.tokens, d, k) + decompress_macs(self.tokens, groups, d, BOTTLENECK)
        return groups * ffn_macs(d, f, gated) + plugin

    def bytes(self) -> int:
        """x read twice and y written once; what is left is group-sized."""
        return 3 * self.x.numel() * self.x.element_size()
