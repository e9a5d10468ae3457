"""Initial values of plugins: in closed form, then by gradient descent at each site alone.

The model runs block by block. The hidden states between two blocks, of the dense model and of each
ratio, lie in temporary files, so memory does not grow with the tokens and every block runs a few
times only. At each site a plugin is fitted to what the dense model has behind that site, on inputs
that the sites before, fitted already, have compressed:

- the merge: tokens whose FFN output a linear map cannot predict get more weight. The scores are the
  least-squares fit of that error's logarithm, used if they serve better than a mean;
- the adapter: the best map of rank r from ``concat(u, h)`` to the wanted output less u
  (reduced-rank regression on moments of all tokens), scaled so that tanh is close to linear, and
  then W_2 once more by least squares on the tanh's real outputs;
- then a few passes of gradient descent through the whole sublayer, its norm included
  (:mod:`descent`).

Tokens weigh by one over their residual's variance, hidden dimensions by the norm's weight where the
norm follows (BERT): that is how much an error matters behind the norm. Runs of sequences are held
out from all fits. They decide how strongly the regressions are regularised, and whether a site
takes its fitted values: only if these lower the error of the model's last hidden state.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ....ops.feed_forward import products
from ....ops.groups import Groups
from ....ops.prepacked_linear import linear
from ....runtime.levels import use_ratio
from ....runtime.site import Site
from ....runtime.state import State
from ....sites.attention import reach_of
from ....sites.feed_forward import describe
from ....sites.find import Found
from .descent import Behind, behind, descend, differentiable
from .fit import Part, SiteFit, hidden, part
from .inputs import Chunk, merged_tokens
from .key_values import KeyValues
from .key_values import fit as fit_key_values
from .search import Errors, put, search, values
from .sensitivity import Output, Sensitivity, sensitivities
from .streams import Blocks, Store, watched
from .table import Calibration, Row

SAMPLE = 8192
"""Tokens, with padding, that decide about the merge and W_2."""


class Run:
    """One calibration. ``dense`` and ``streams`` hold the input of the block that is next."""

    def __init__(
        self,
        found: Found,
        state: State,
        blocks: Blocks,
        given: list[Chunk],
        ratios: list[int],
        backend: str,
        output: Output,
    ) -> None:
        self.backend, self.output = backend, output
        self.found, self.state, self.layers = found, state, found.layers
        self.blocks, self.chunks, self.ratios = blocks, given, ratios
        self.levels = {k: state.everywhere(k) for k in ratios}
        held_out = {i: chunk for i, chunk in enumerate(given) if chunk.held_out}
        fitted = [i for i, chunk in enumerate(given) if not chunk.held_out]
        size = sum(given[i].mask.numel() for i in fitted)
        self.sample = [*fitted[:: max(1, size // SAMPLE)], *held_out]
        self.groups: dict[tuple[int, int], Groups] = {}
        self.dense, self.after, self.wanted, self.x = Store(), Store(), Store(), Store()
        self.attended = Store()
        self.streams = {k: Store() for k in ratios}
        self.errors = Errors(blocks, state, held_out)
        self.sensitivities: dict[Site, Sensitivity] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        stores = self.dense, self.after, self.wanted, self.attended, self.x
        for store in (*stores, *self.streams.values()):
            store.close()

    def all(self, merge: bool, adapter: bool, passes: int, progress: bool) -> Calibration:
        own = [
            site for _, site in self.state.own_sites if merge or site.placement != "attention_kv"
        ]
        # In the order in which they run, each with the ratios that it has plugins for.
        todo = [
            (k, site)
            for i in range(len(self.layers))
            for k in self.ratios
            for site in sorted(own, key=lambda site: site.placement == "ffn")
            if site.layer == i and k in self.state.method.placements[site.placement]
        ]
        plugins = {(k, site): self.found.at(site).plugins[str(k)] for k, site in todo}
        initial = {place: values(plugin) for place, plugin in plugins.items()}
        before = {k: self.errors.of(self.levels[k]) for k in self.ratios}
        if passes and self.ratios:
            self._look()
        rows: dict[tuple[int, Site], Row] = {}
        bar = tqdm(total=len(todo), disable=not progress, unit="site")
        with bar:
            for i in range(len(self.layers) if self.ratios else 0):
                self._dense(i)
                for k in self.ratios:
                    for place in (place for place in todo if place[0] == k and place[1].layer == i):
                        site = place[1]
                        if site.placement == "attention_kv" and not self.found.family.decoder:
                            rows[place] = self._key_values(site, k, passes)
                        elif site.placement == "ffn":
                            rows[place] = self._site(site, k, merge, adapter, passes)
                        bar.update()
                    if i + 1 < len(self.layers):
                        self._advance(i, k)
                self.dense, self.after = self.after, self.dense
        made = []
        for k in self.ratios:
            mine = [rows[place] for place in todo if place[0] == k and place in rows]
            end = self.errors.of(self.levels[k])
            if end > before[k]:
                for place in todo:
                    if place[0] == k:
                        put(plugins[place], initial[place])
                mine, end = [row._replace(after=row.before, step=0.0) for row in mine], before[k]
            made += [*mine, Row(k, None, before[k], end, None, "")]
        return Calibration(tuple(made))

    def _look(self) -> None:
        """What matters behind each site, where gradients pass the model."""
        merged = []
        placement = self.state.sites[0].placement
        for chunk in self.chunks:
            k = self.ratios[0]
            x, context = self.blocks.at(chunk.inputs, self.levels[k], 0, None, placement)
            groups = context.groups(x, k, "reference")
            merged.append(merged_tokens(x, groups)[1].view(chunk.mask.shape))
        masks = [chunk.mask for chunk in self.chunks]
        sites = sorted(self.state.sites, key=lambda s: (s.layer, s.placement == "ffn"))
        layers = [self.found.at(site) for site in sites]
        # Whole queries too see merged keys.
        tokens = [masks if site.placement == "attention_kv" else merged for site in sites]
        try:
            with use_ratio(self.blocks.model, 1):
                found = sensitivities(layers, self.output, self.chunks, tokens)
            self.sensitivities = dict(zip(sites, found, strict=True))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            warnings.warn(
                f"calibrate weighs all errors alike: no gradient passes the model ({error})",
                stacklevel=3,
            )

    def _dense(self, i: int) -> None:
        """Block ``i`` of the dense model: what is behind its sublayers, and behind the block."""
        placements = self.state.method.placements
        ffn = describe(self.layers[i]) if "ffn" in placements else None
        for j, chunk in enumerate(self.chunks):
            got: list[Tensor] = []
            attended: list[Tensor] = []
            before = self._input(self.dense, i, j)
            keys = "attention_kv" in placements and not self.found.family.decoder
            with watched(self.found, i if keys else None, attended):
                self.after[j] = self.blocks.run(
                    chunk.inputs, 1, i, i + 1, before, partial(_collect, got)
                )
            if attended:
                self.attended[j] = self._finite(attended[-1], chunk, f"attention {i}")
            if ffn is not None:
                y = got[0] + products(hidden(got[0], ffn), ffn, linear)
                self.wanted[j] = self._finite(y, chunk, f"FFN {i}")

    @staticmethod
    def _finite(y: Tensor, chunk: Chunk, where: str) -> Tensor:
        if not y[chunk.mask].isfinite().all():
            raise FloatingPointError(
                f"the dense model's hidden states behind {where} are not finite: "
                "look for non-finite weights and inputs, or use a wider dtype"
            )
        return y

    def _inputs(self, site: Site, k: int) -> None:
        """What the compressed model has in front of a site goes to ``self.x``."""
        for j, chunk in enumerate(self.chunks):
            before = self._input(self.streams[k], site.layer, j)
            self.x[j], context = self.blocks.at(
                chunk.inputs, self.levels[k], site.layer, before, site.placement
            )
            if (k, j) not in self.groups:  # the same in every layer
                self.groups[k, j] = context.groups(self.x[j], k, "reference")

    def _key_values(self, site: Site, k: int, passes: int) -> Row:
        layer = self.found.at(site)
        plugin, known = layer.plugins[str(k)], self.sensitivities
        self._inputs(site, k)
        before = values(plugin)
        fitted = KeyValues(layer.self_attention(), reach_of(layer), self.backend)
        root, weights = (None, None) if known is None else known[site]

        def positions(j: int) -> Tensor:
            given = self.chunks[j].inputs.get("position_ids")
            return torch.arange(self.x[j].shape[1])[None] if given is None else given

        def chunk(j: int) -> tuple[Behind, Tensor]:
            weight = None if weights is None else weights[j]
            x, mask = self.x[j], self.chunks[j].mask
            groups = self.groups[k, j]
            found = fitted.behind(x, self.attended[j], mask, groups, weight)
            return found, positions(j).to(x.device)

        sample = [
            (self.x[j], self.chunks[j].mask, self.groups[k, j], positions(j), c.held_out)
            for j in self.sample
            for c in (self.chunks[j],)
        ]
        chunks = [partial(chunk, j) for j, c in enumerate(self.chunks) if not c.held_out]
        fit_key_values(plugin, fitted, sample, chunks, root, passes)
        return Row(k, site.layer, *self._search(site, k, plugin, before), site.placement)

    def _search(
        self, site: Site, k: int, plugin: nn.Module, before: list[Tensor]
    ) -> tuple[float, float, float]:
        i = site.layer
        return search(
            plugin,
            before,
            lambda: (
                self.errors.upto(k, site, self.streams[k] if i else None),
                self.errors.alone(k, site, self.dense if i else None),
            ),
        )

    def _site(self, site: Site, k: int, merge: bool, adapter: bool, passes: int) -> Row:
        i = site.layer
        ffn, plugin = describe(self.layers[i]), self.layers[i].plugins[str(k)]
        self._inputs(site, k)

        def make(j: int) -> Part:
            held_out = self.chunks[j].held_out
            return part(self.x[j], self.wanted[j], self.groups[k, j], ffn, held_out)

        before = values(plugin)
        sample = [made for j in self.sample if len((made := make(j)).place)]
        if any(not part.held_out for part in sample):
            fit = SiteFit(ffn, sample, lambda: map(make, range(len(self.chunks))))
            fit.fit(plugin, merge, adapter)
            if passes and differentiable(ffn, self.x[0].shape[-1]):
                self._descend(i, k, fit, passes, merge, adapter)
        return Row(k, i, *self._search(site, k, plugin, before))

    def _descend(
        self, i: int, k: int, fit: SiteFit, passes: int, merge: bool, adapter: bool
    ) -> None:
        plugin, known = self.layers[i].plugins[str(k)], self.sensitivities
        root, weights = (None, None) if known is None else known[Site("ffn", i)]

        def make(j: int) -> Behind:
            weight = None if weights is None else weights[j]
            given = self.x[j], self.wanted[j], self.groups[k, j]
            return behind(*given, fit.ffn, fit.floor, weight)

        fitted = [partial(make, j) for j, chunk in enumerate(self.chunks) if not chunk.held_out]
        spread = fit.spread(plugin.merge)
        descend(plugin, fit.ffn, spread, root, fitted, self.backend, passes, merge, adapter)

    def _advance(self, i: int, k: int) -> None:
        """Block ``i`` as it is compressed now."""
        stream = self.streams[k]
        for j, chunk in enumerate(self.chunks):
            stream[j] = self.blocks.run(
                chunk.inputs, self.levels[k], i, i + 1, self._input(stream, i, j)
            )

    @staticmethod
    def _input(stream: Store, i: int, j: int) -> Tensor | None:
        """Of block ``i``; the first has the encoder's own."""
        return stream[j] if i else None


def _collect(into: list[Tensor], layer: nn.Module, x: Tensor) -> None:
    into.append(x)
