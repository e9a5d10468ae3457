"""Losses over the original's, by start and training."""

from pathlib import Path
from statistics import mean

from ..harness.results import Row, pick
from ..harness.style import AMBER, BLUE, GREY, INK, commit, note, sheet

COLOURS = {"none": GREY, "plain": AMBER, "projected": BLUE}


def _near(row: Row) -> float:
    """The share of a panel: sizes hardly ever give a round one."""
    return round(20 * row["share"]) / 20


def projected(content: Row, target: Path) -> None:
    """A panel a share, to the nearest twentieth: a bar for each start, training and number of
    tokens, the mean over seeds; dots are seeds."""
    rows, model, here = pick(content["rows"], status="ok"), content["model"], content["machine"]
    shares = sorted({_near(row) for row in rows}, reverse=True)
    title = f"Projected Compression of {model['name']}"
    caption = (
        f"nats over the original's {model['loss']:.3f}; {here['cpu']}, "
        f"{content['date']}, {commit(content)}"
    )
    bars = {
        share: dict.fromkeys(
            (row["start"], row["training"], row["tokens"]) for row in rows if _near(row) == share
        )
        for share in shares
    }
    height = 1.6 + 0.32 * max(map(len, bars.values()), default=1)
    size = (6.2 * max(len(shares), 1), height)
    with sheet(target, 1, len(shares), size, title, caption) as panels:
        for axes, share in zip(panels[0], shares, strict=False):
            keys = bars[share]
            names = []
            for place, (start, training, tokens) in enumerate(keys):
                some = pick(rows, start=start, training=training, tokens=tokens)
                values = [row["excess"] for row in some if _near(row) == share]
                axes.barh(place, mean(values), color=COLOURS[training], height=0.66)
                axes.plot(values, [place] * len(values), "k.", ms=4)
                beside = max(values), place
                style = {"va": "center", "fontsize": 8.5, "color": INK}
                note(axes, f"{mean(values):+.3f}", beside, (6, 0), **style)
                after = f"{training}, {tokens / 1000:.0f}k tokens" if tokens else "untrained"
                names.append(f"{start}; {after}")
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.invert_yaxis()
            found = [row["excess"] for row in rows if _near(row) == share]
            if min(found) > 0:
                axes.set_xscale("log")
                axes.set_xlim(min(found) / 2, max(found) * 4)
            axes.set_xlabel("nats over the original")
            axes.grid(axis="x")
            axes.set_title(f"{100 * share:.0f} % of the parameters")
