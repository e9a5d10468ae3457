"""LLaMA's FFN sublayer: of decoders the benchmarks know that alone."""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from variator_kernels import FeedForward


class Llama(nn.Module):
    """Norm to residual, of Hugging Face's modules."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))

    def feed_forward(self) -> FeedForward:
        up, gate, down = self.mlp.up_proj, self.mlp.gate_proj, self.mlp.down_proj
        norm: dict[str, Any] = {"norm_weight": self.norm.weight, "eps": self.norm.variance_epsilon}
        return FeedForward(
            gate.weight, down.weight, up.weight, activation="silu", norm="rms", **norm
        )
