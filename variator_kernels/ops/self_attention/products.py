"""The four products of a self-attention sublayer, and norms of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import prepacked_linear
from ..feed_forward import autocasts
from ..int8_linear import op as int8_linear
from ..int8_linear.module import StoredProduct
from ..transforms import is_plain
from .description import Project, SelfAttention
from .pairs import Content
from .terms import Distances


def queries(h: Tensor, attention: SelfAttention) -> Tensor:
    """``[B, n, H, head_size]`` of ``h [B, n, d]``, before rotations."""
    modules = attention.modules
    if modules is not None:
        q = _run(modules.q, h, attention)
    else:
        q = _linear(h, attention.w_q, attention.b_q, attention)
    q = q.unflatten(-1, (-1, attention.head_size))
    return q if attention.q_norm is None else attention.q_norm(q)


def keys_and_values(source: Tensor, attention: SelfAttention) -> tuple[Tensor, Tensor]:
    """``[B, G, H_kv, head_size]`` each of ``source [B, G, d]``, before rotations."""
    modules = attention.modules
    if modules is not None:
        k, v = _run(modules.k, source, attention), _run(modules.v, source, attention)
    else:
        k = _linear(source, attention.w_k, attention.b_k, attention)
        v = _linear(source, attention.w_v, attention.b_v, attention)
    k, v = (t.unflatten(-1, (-1, attention.head_size)) for t in (k, v))
    return (k if attention.k_norm is None else attention.k_norm(k)), v


def by_content(
    q: Tensor, k: Tensor, distances: Distances | None, attention: SelfAttention
) -> Content | None:
    """What queries ``[B, n, H, size]`` and keys ``[B, G, H, size]`` are to vectors of distances,
    scaled as the scores are; None where the sublayer has no such terms."""
    if distances is None or attention.of_distances is None:
        return None
    of_keys, of_queries, dropout = attention.of_distances
    vectors = F.dropout(distances.vectors, dropout) if dropout > 0 else distances.vectors

    wide = torch.promote_types(q.dtype, torch.float32)

    def made(project: Project) -> Tensor:
        return project(vectors).unflatten(-1, (-1, attention.head_size)).to(wide)

    asked = met = None
    if of_keys is not None:
        asked = q.to(wide) * attention.scale, made(of_keys)
    if of_queries is not None:
        met = torch.einsum("bghs,whs->bghw", k.to(wide) * attention.scale, made(of_queries))
    return Content(asked, met)


def output(out: Tensor, attention: SelfAttention) -> Tensor:
    """``[B, n, d]`` of what the heads found, ``[B, n, H, head_size]``."""
    out = out.flatten(-2)
    if attention.modules is not None:
        return _run(attention.modules.o, out, attention)
    return _linear(out, attention.w_o, attention.b_o, attention)


def _run(project: Project, x: Tensor, attention: SelfAttention) -> Tensor:
    if not isinstance(project, StoredProduct):
        return project(x)
    return project(x, attention.precision) if attention.pack else project.module(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, attention: SelfAttention) -> Tensor:
    if not autocasts(x):
        x = x.to(weight.dtype)
    if attention.precision == "int8":
        return int8_linear.linear(x, weight, bias)
    # A program that is traced must not depend on how many there are.
    few = is_plain(x) and x.numel() <= prepacked_linear.FEW * x.shape[-1]
    pack = attention.pack and not few
    return (prepacked_linear.packed if pack else prepacked_linear.unpacked)(x, weight, bias)
