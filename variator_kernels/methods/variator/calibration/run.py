"""Initial values of plugins: in closed form, then by gradient descent at each site alone.

The model runs block by block. The hidden states between two blocks, of the dense model and of each
level, lie in temporary files, so memory does not grow with the tokens and every block runs a few
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
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ....ops.groups import Groups
from ....runtime.level import Level
from ....runtime.levels import use_ratio
from ....runtime.site import Site
from ....runtime.state import State
from ....sites.feed_forward import describe
from ....sites.found import Found
from ....sites.reach import reach_of
from .around_attention import AroundAttention
from .descent import Behind, Sublayer, behind, descend, differentiable
from .fit import Part, SiteFit, part
from .hidden_states import HiddenStates
from .inputs import Chunk, merged_tokens
from .key_values import KeyValues
from .key_values import fit as fit_key_values
from .search import put, search, values
from .sensitivity import Output, Sensitivity, sensitivities
from .streams import Blocks, Store
from .table import Calibration, Row


class Run(HiddenStates):
    """One calibration."""

    def __init__(
        self,
        found: Found,
        state: State,
        blocks: Blocks,
        given: list[Chunk],
        levels: list[Level],
        backend: str,
        output: Output,
    ) -> None:
        super().__init__(found, state, blocks, given, levels)
        self.backend, self.output = backend, output
        self.sensitivities: dict[Site, Sensitivity] | None = None
        self.fitted: set[tuple[Site, int]] = set()
        """Plugins for which there was something to fit to, by site and ratio."""

    def all(self, merge: bool, adapter: bool, passes: int, progress: bool) -> Calibration:
        own = [
            site for _, site in self.state.own_sites if merge or site.placement != "attention_kv"
        ]
        # In the order in which they run, each at the levels that compress it.
        todo = [
            (level, site)
            for i in range(len(self.layers))
            for level in self.levels
            for site in sorted(own, key=lambda site: site.placement == "ffn")
            if site.layer == i and self.ratio(level, site) > 1
        ]
        plugins = {place: self._plugin(*place) for place in todo}
        initial = {place: values(plugin) for place, plugin in plugins.items()}
        before = {level: self.errors.of(level) for level in self.levels}
        if passes and self.levels:
            self._look()
        rows: dict[tuple[Level, Site], Row] = {}
        bar = tqdm(total=len(todo), disable=not progress, unit="site")
        with bar:
            for i in range(len(self.layers) if self.levels else 0):
                self._dense(i)
                for level in self.levels:
                    here = (p for p in todo if p[0] is level and p[1].layer == i)
                    for place in here:
                        site = place[1]
                        if site.placement != "attention_kv":
                            rows[place] = self._site(site, level, merge, adapter, passes)
                        elif not self.found.family.decoder:
                            rows[place] = self._key_values(site, level, passes)
                        bar.update()
                    if i + 1 < len(self.layers):
                        self._advance(i, level)
                self.dense, self.after = self.after, self.dense
        made = []
        for level in self.levels:
            mine = [rows[place] for place in todo if place[0] is level and place in rows]
            start, end = before[level], self.errors.of(level)
            if end > start:
                for place in todo:
                    if place[0] is level:
                        put(plugins[place], initial[place])
                mine, end = [row._replace(after=row.before, step=0.0) for row in mine], start
            ratios = {k for k in level.ratios if k > 1}
            k = ratios.pop() if len(ratios) == 1 else None
            made += [*mine, Row(k, None, start, end, None, "")]
        numbers = {site: number for number, site in self.state.own_sites}
        self.state.fitted |= {(numbers[site], k) for site, k in self.fitted}
        return Calibration(tuple(made))

    def _plugin(self, level: Level, site: Site) -> Any:
        return self.found.at(site).plugins[str(self.ratio(level, site))]

    def _look(self) -> None:
        """What matters behind each site, where gradients pass the model."""
        merged = []
        placement = self.state.sites[0].placement
        level = self.levels[0]
        k = max(level.ratios)
        for chunk in self.chunks:
            x, context = self.blocks.at(chunk.inputs, level, 0, None, placement)
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

    def _key_values(self, site: Site, level: Level, passes: int) -> Row:
        layer, k = self.found.at(site), self.ratio(level, site)
        plugin, known = self._plugin(level, site), self.sensitivities
        self._inputs(site, level)
        before = values(plugin)
        fitted = KeyValues(layer.self_attention(), reach_of(layer), self.backend)
        root, weights = (None, None) if known is None else known[site]

        def chunk(j: int) -> Behind:
            weight = None if weights is None else weights[j]
            rows = self.x[j], self.attended[j], self.chunks[j].mask, self.groups[k, j]
            return fitted.behind(*rows, weight, self._positions(j))

        sample = self._sample(k)
        chunks = [partial(chunk, j) for j, c in enumerate(self.chunks) if not c.held_out]
        fit_key_values(plugin, fitted, sample, chunks, root, passes)
        self.fitted.add((site, k))
        return Row(k, site.layer, *self._search(site, level, plugin, before), site.placement)

    def _sample(self, k: int) -> list[tuple[Tensor, Tensor, Groups, Tensor, bool]]:
        """As :meth:`KeyValues.scores` takes it."""
        chunks = ((j, self.chunks[j]) for j in self.sample)
        return [
            (self.x[j], c.mask, self.groups[k, j], self._positions(j), c.held_out)
            for j, c in chunks
        ]

    def _search(
        self, site: Site, level: Level, plugin: nn.Module, before: list[Tensor]
    ) -> tuple[float, float, float]:
        i = site.layer
        return search(
            plugin,
            before,
            lambda: (
                self.errors.upto(level, site, self.streams[level] if i else None),
                self.errors.alone(level, site, self.dense if i else None),
            ),
        )

    def _site(self, site: Site, level: Level, merge: bool, adapter: bool, passes: int) -> Row:
        k, plugin = self.ratio(level, site), self._plugin(level, site)
        wanted = self.wanted if site.placement == "ffn" else self.attended
        sublayer, received = self._sublayer(site)
        self._inputs(site, level)

        def make(j: int) -> Part:
            x, groups, held_out = self.x[j], self.groups[k, j], self.chunks[j].held_out
            return part(x, wanted[j], groups, sublayer(x, groups, self._positions(j)), held_out)

        before = values(plugin)
        sample = [made for j in self.sample if len((made := make(j)).place)]
        if any(not part.held_out for part in sample):
            fit = SiteFit(sample, lambda: map(make, range(len(self.chunks))))
            other = [] if received is None or not merge else [received.scores(self._sample(k))]
            fit.fit(plugin, merge, adapter, other)
            self.fitted.add((site, k))
            if passes and differentiable(fit.ffn, sample[0].groups, self.x[0].shape[-1]):
                self._descend(site, level, sublayer, fit, wanted, passes, merge, adapter)
        return Row(k, site.layer, *self._search(site, level, plugin, before), site.placement)

    def _sublayer(self, site: Site) -> tuple[Sublayer, KeyValues | None]:
        """What the plugins of a site go around, and who is asked which tokens attention reads."""
        layer = self.found.at(site)
        if site.placement == "ffn":
            ffn = describe(layer)
            return lambda *_: ffn, None
        given = layer.self_attention(), reach_of(layer), self.backend
        return AroundAttention(*given), KeyValues(*given)

    def _descend(
        self,
        site: Site,
        level: Level,
        sublayer: Sublayer,
        fit: SiteFit,
        wanted: Store,
        passes: int,
        merge: bool,
        adapter: bool,
    ) -> None:
        k, plugin, known = self.ratio(level, site), self._plugin(level, site), self.sensitivities
        root, weights = (None, None) if known is None else known[site]

        def make(j: int) -> Behind:
            weight = None if weights is None else weights[j]
            given = self.x[j], wanted[j], self.groups[k, j]
            return behind(*given, fit.ffn, fit.floor, weight, self._positions(j))

        fitted = [partial(make, j) for j, chunk in enumerate(self.chunks) if not chunk.held_out]
        spread = fit.spread(plugin.merge)
        descend(plugin, sublayer, spread, root, fitted, self.backend, passes, merge, adapter)
