"""What the dense model and the compressed ones have between two blocks, and in front of a site."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ....ops.feed_forward import products
from ....ops.groups import Groups
from ....ops.prepacked_linear import linear
from ....runtime.level import Level
from ....runtime.site import Site
from ....runtime.state import State
from ....sites.family import follow
from ....sites.feed_forward import describe
from ....sites.found import Found
from .fit import hidden
from .inputs import Chunk
from .search import Errors
from .streams import Blocks, Store, watched

SAMPLE = 8192
"""Tokens, with padding, that decide about the merge and W_2."""


class HiddenStates:
    """``dense`` and ``streams`` hold the input of the block that is next."""

    def __init__(
        self,
        found: Found,
        state: State,
        blocks: Blocks,
        given: list[Chunk],
        levels: list[Level],
    ) -> None:
        self.found, self.state, self.layers = found, state, found.layers
        self.blocks, self.chunks, self.levels = blocks, given, levels
        held_out = {i: chunk for i, chunk in enumerate(given) if chunk.held_out}
        fitted = [i for i, chunk in enumerate(given) if not chunk.held_out]
        size = sum(given[i].mask.numel() for i in fitted)
        self.sample = [*fitted[:: max(1, size // SAMPLE)], *held_out]
        self.groups: dict[tuple[int, int], Groups] = {}
        """Of a ratio and a chunk: the same in every layer."""
        self.dense, self.after, self.wanted, self.x = Store(), Store(), Store(), Store()
        self.attended = Store()
        self.streams = {level: Store() for level in levels}
        self.errors = Errors(blocks, state, held_out)

    def close(self) -> None:
        """Deletes the temporary files."""
        stores = self.dense, self.after, self.wanted, self.attended, self.x
        for store in (*stores, *self.streams.values()):
            store.close()

    def _dense(self, i: int) -> None:
        """Block ``i`` of the dense model: what is behind its sublayers, and behind the block."""
        placements = self.state.method.placements
        ffn = describe(self.layers[i]) if "ffn" in placements else None
        module = self._attention(i)
        for j, chunk in enumerate(self.chunks):
            got: list[Tensor] = []
            attended: list[Tensor] = []
            before = self._input(self.dense, i, j)
            with watched(module, attended):
                self.after[j] = self.blocks.run(
                    chunk.inputs, 1, i, i + 1, before, partial(_collect, got)
                )
            if attended:
                y = attended[-1]
                if "attention" in placements:  # in front of a norm, as for an FFN
                    y = y + self.blocks.at(chunk.inputs, 1, i, before, "attention")[0]
                self.attended[j] = self._finite(y, chunk, f"attention {i}")
            if ffn is not None:
                y = got[0] + products(hidden(got[0], ffn), ffn, linear)
                self.wanted[j] = self._finite(y, chunk, f"FFN {i}")

    def _attention(self, i: int) -> nn.Module | None:
        """The module whose output a plugin around attention, or in front of its keys, is to match:
        the last product, or the sublayer."""
        placements = self.state.method.placements
        if "attention" in placements:
            paths = self.found.family.attention
            assert paths is not None
            product: nn.Module = follow(self.found.attentions[i], paths.o)
            return product
        keys = "attention_kv" in placements and not self.found.family.decoder
        return self.found.attentions[i] if keys else None

    @staticmethod
    def _finite(y: Tensor, chunk: Chunk, where: str) -> Tensor:
        if not y[chunk.mask].isfinite().all():
            raise FloatingPointError(
                f"the dense model's hidden states behind {where} are not finite: "
                "look for non-finite weights and inputs, or use a wider dtype"
            )
        return y

    def ratio(self, level: Level, site: Site) -> int:
        """The one of a site."""
        return level.ratios[self.state.sites.index(site)]

    def _inputs(self, site: Site, level: Level) -> None:
        """What the compressed model has in front of a site goes to ``self.x``."""
        k = self.ratio(level, site)
        for j, chunk in enumerate(self.chunks):
            before = self._input(self.streams[level], site.layer, j)
            self.x[j], context = self.blocks.at(
                chunk.inputs, level, site.layer, before, site.placement
            )
            if (k, j) not in self.groups:
                self.groups[k, j] = context.groups(self.x[j], k, "reference")

    def _positions(self, j: int) -> Tensor:
        """Position ids ``[B, n]`` of a chunk."""
        chunk, x = self.chunks[j], self.x[j]
        given = chunk.inputs.get("position_ids")
        if given is None:
            given = torch.arange(x.shape[1])[None]
        return given.to(x.device).expand(chunk.mask.shape)

    def _advance(self, i: int, level: Level) -> None:
        """Block ``i`` as it is compressed now."""
        stream = self.streams[level]
        for j, chunk in enumerate(self.chunks):
            stream[j] = self.blocks.run(chunk.inputs, level, i, i + 1, self._input(stream, i, j))

    @staticmethod
    def _input(stream: Store, i: int, j: int) -> Tensor | None:
        """Of block ``i``; the first has the encoder's own."""
        return stream[j] if i else None


def _collect(into: list[Tensor], layer: nn.Module, x: Tensor) -> None:
    into.append(x)
