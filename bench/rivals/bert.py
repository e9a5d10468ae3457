"""BERT for classification with blocks that rivals change.

In inference its products run as a patched model's do (packed weights; queries, keys and values in
one), and attention is PyTorch's fused one wherever a method does not need its weights.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .. import internals


class Tokens(NamedTuple):
    """Hidden states ``x [B, n, d]``, which of them are ``real [B, n]`` (padding is on the right),
    and of how many tokens each is made, ``size [B, n]``; None: of one."""

    x: Tensor
    real: Tensor
    size: Tensor | None = None


class Block(nn.Module):
    """A layer of BERT as it is; its modules are shared, not copied."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.heads = layer.attention.self.num_attention_heads
        self.work = 0, 0, 0
        """Of the last forward: vectors and pairs of them in attention, padding too, and real
        vectors that pass the FFN."""

    def forward(self, tokens: Tokens) -> Tokens:
        return self.whole(tokens._replace(x=self.attention(tokens)[0]))

    def whole(self, tokens: Tokens) -> Tokens:
        """Behind the FFN sublayer, which all tokens pass."""
        self.work = *self.work[:2], int(tokens.real.sum())
        return tokens._replace(x=self.feed_forward(tokens.x))

    def attention(self, tokens: Tokens) -> tuple[Tensor, Any]:
        """The sublayer's output ``[B, n, d]``, and what :meth:`attend` found besides."""
        x, real, size = tokens
        batch, n = real.shape
        self.work = batch * n, batch * n * n, 0
        own, out = self.layer.attention.self, self.layer.attention.output
        parts = linear(x, (own.query, own.key, own.value)).view(batch, n, 3, self.heads, -1)
        mask: Tensor | None = real[:, None, None]
        if size is not None:
            mask = torch.where(real, size.log(), -torch.inf)[:, None, None]
        elif bool(real.all()):
            mask = None
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        context, more = self.attend(q, k, v, mask, real)
        y = linear(context.transpose(1, 2).reshape(x.shape), (out.dense,), residual=x)
        return out.LayerNorm(y), more

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, real: Tensor
    ) -> tuple[Tensor, Any]:
        """``q``, ``k``, ``v``, and the first of what it returns: ``[B, heads, n, d / heads]``."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None

    def feed_forward(self, x: Tensor) -> Tensor:
        """The sublayer of ``x [..., d]``, residual and norm included."""
        first, last = self.layer.intermediate, self.layer.output
        inner = linear(x, (first.dense,), first.intermediate_act_fn)
        return last.LayerNorm(linear(inner, (last.dense,), residual=x))

    def multiply_adds(self) -> int:
        """Of the last forward, counted as ``vk.flops`` does."""
        vectors, pairs, inner = self.work
        f, d = self.layer.intermediate.dense.weight.shape
        return vectors * 4 * d * d + pairs * 2 * d + inner * 2 * d * f


class Classifier(nn.Module):
    """A ``BertForSequenceClassification`` with other blocks, without dropout."""

    aligned = True
    """Whether each hidden state belongs to the token at its place."""

    def __init__(self, model: Any, blocks: Callable[[Any], Block]) -> None:
        super().__init__()
        if model.config.model_type != "bert":
            raise ValueError(f"model must be a bert, got a {model.config.model_type}")
        self.model, self.config = model, model.config
        self.blocks: Any = nn.ModuleList([blocks(layer) for layer in model.bert.encoder.layer])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None,
        labels: Tensor | None = None, output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Logits and all hidden states; ``loss`` is what the method wants to be small besides."""
        bert, found = self.model.bert, []
        x = bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        tokens = Tokens(x, attention_mask.bool())
        for block in self.blocks:
            found.append(tokens.x)
            tokens = block(tokens)
        logits = self.model.classifier(bert.pooler(tokens.x))
        return SequenceClassifierOutput(
            loss=self.penalty(), logits=logits, hidden_states=(*found, tokens.x)
        )

    def penalty(self) -> Tensor | None:
        return None

    def multiply_adds(self) -> int:
        """Of the last forward, without the pooler."""
        return sum(block.multiply_adds() for block in self.blocks)


GELU = ("GELUActivation",)


def linear(
    x: Tensor, parts: Iterable[Any], activation: Any = None, residual: Tensor | None = None
) -> Tensor:
    """``activation(x · weightᵀ + bias) + residual`` with the weights of ``parts`` one below the
    other; in inference from their packed forms."""
    weights, biases = zip(*((part.weight, part.bias) for part in parts), strict=True)
    known = activation is None or type(activation).__name__ in GELU
    if known and internals.product_runs(x, (*weights, *biases)):
        kind = "none" if activation is None else "gelu"
        rows, more = x.reshape(-1, x.shape[-1]), None
        if residual is not None:
            more = residual.reshape(-1, residual.shape[-1])
        y = internals.Product(weights, biases)(rows, activation=kind, residual=more)
        return y.view(*x.shape[:-1], -1)
    y = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    y = y if activation is None else activation(y)
    return y if residual is None else y + residual
