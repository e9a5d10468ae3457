"""A plan as a picture; needs matplotlib."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

COLOURS = {"ffn": "#2b6cb0", "attention": "#c05621", "attention_kv": "#c05621"}


def figure_of(plan: Any) -> Figure:
    """Bars of the ratios over the layers, one a placement."""
    placements = plan.by_placement
    figure = Figure(figsize=(6.4, 3.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(placements)
    for i, (place, ratios) in enumerate(placements.items()):
        at = [layer + (i - (len(placements) - 1) / 2) * width for layer in ratios]
        axes.bar(at, list(ratios.values()), width, color=COLOURS[place], label=place)
    every = sorted({1, *plan.ratios})
    axes.set_yscale("log", base=2)
    axes.set_yticks(every, [str(k) if k > 1 else "1 (dense)" for k in every])
    axes.set_ylim(2**-0.5, every[-1] * 2**0.25)
    axes.set_xticks(sorted({site.layer for site in plan.sites}))
    axes.set_xlabel("layer")
    axes.set_ylabel("ratio")
    axes.set_title(
        f"{plan.asked}={plan.limit:g} by {plan.measure}: cost {plan.cost:.3f}, "
        f"loss {plan.loss:.3g}",
        fontsize=10,
        loc="left",
    )
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
