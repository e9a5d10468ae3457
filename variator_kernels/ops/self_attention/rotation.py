"""Rotations of queries and keys by their positions (RoPE)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms import is_plain


class Rotation(NamedTuple):
    """Cosines and sines ``[B or 1, m, head_size]`` of m positions (RoPE)."""

    cos: Tensor
    sin: Tensor
    neighbours: bool = False
    """Whether neighbours in a head are the two components, and not its halves."""

    def of(self, vectors: Tensor) -> Tensor:
        """``vectors [B, m, H, head_size]`` turned. What the cosines have no place for at a head's
        end stays. Of neighbours the halves come out: products of queries and keys are the same."""
        if self.neighbours:
            halves = torch.cat((vectors[..., ::2], vectors[..., 1::2]), -1)
            return self._replace(neighbours=False).of(halves)
        size, part = vectors.shape[-1], self.cos.shape[-1]
        if part > size:
            raise ValueError(f"position_embeddings must turn heads of {size}, got {part}")
        if part < size:
            turned = self.of(vectors[..., :part])
            return torch.cat((turned, vectors[..., part:]), -1)
        given = (vectors, self.cos, self.sin)
        if not torch.is_grad_enabled() and all(is_plain(t) for t in given):
            return self._in_few_passes(vectors)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        x, cos, sin = vectors.to(wide), self.cos[:, :, None].to(wide), self.sin[:, :, None].to(wide)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(vectors.dtype)

    def _in_few_passes(self, vectors: Tensor) -> Tensor:
        """The same, over memory twice: the two components are written where they belong."""
        turned = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        cos, sin = (t[:, :, None].to(vectors.dtype).chunk(2, -1) for t in (self.cos, self.sin))
        x, y = vectors.chunk(2, -1)
        first, second = turned.chunk(2, -1)
        torch.mul(x, cos[0], out=first)
        first.addcmul_(y, sin[0], value=-1)
        torch.mul(y, cos[1], out=second)
        second.addcmul_(x, sin[1])
        return turned

    def rows(self, index: Tensor) -> Rotation:
        """Of some rows."""
        if self.cos.shape[0] == 1:
            return self
        return self._replace(cos=self.cos[index], sin=self.sin[index])


def turned_between(table: Tensor, positions: Tensor) -> Rotation:
    """Of ``positions [B or 1, m]``, which need not be whole numbers, by a ``table [positions,
    head_size]`` of sines and, behind them, cosines (RoFormer's).

    What is beyond a whole position turns on by that part of the angle of position 1.
    """
    whole = positions.floor()
    sin, cos = table[whole.long()].double().chunk(2, -1)
    sine, cosine = table[min(1, table.shape[0] - 1)].double().chunk(2, -1)
    more = (positions - whole)[..., None].double() * torch.atan2(sine, cosine)
    cos, sin = cos * more.cos() - sin * more.sin(), sin * more.cos() + cos * more.sin()
    cos, sin = (torch.cat((t, t), -1).to(table.dtype) for t in (cos, sin))
    return Rotation(cos, sin, neighbours=True)
