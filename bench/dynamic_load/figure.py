"""A picture over time: what comes, at which levels it is answered, how long that takes."""

from pathlib import Path
from typing import Any

from ..harness import style
from ..harness.results import Row

LEVELS = (style.DENSE, style.AMBER, style.BROWN, style.BLUE, style.NAVY)


def draw(content: Row, path: Path) -> Path:
    """Beside the JSON: a column an arm."""
    target = path.with_suffix(".png")
    arms = [r for r in content["rows"] if r["case"] == "trace" and r["status"] == "ok"]
    settings = content["settings"]
    machine = content["machine"]
    caption = (
        f"{machine['cpu']}, {machine['cores']} cores, server {settings['server']}, model on "
        f"{settings['threads']} thread(s), load generator on the same machine; dense capacity "
        f"{content.get('capacity', 0):.0f} requests/s; commit {style.commit(content)}"
    )
    title = "A burst of load: fixed levels and the controller"
    size = (3.4 * max(len(arms), 1) + 0.6, 7.5)
    with style.sheet(target, 3, len(arms), size, title, caption) as lines:
        for column, row in enumerate(arms):
            _arm(row, [line[column] for line in lines], column == 0)
    return target


def _arm(row: Row, axes: list[Any], first: bool) -> None:
    rate, levels, latency = axes
    seconds = [one for one in row["over_time"] if one["requests"]]
    at = [one["second"] + 0.5 for one in seconds]
    rate.plot(at, [one["requests"] for one in seconds], color=style.INK, lw=1)
    rate.set_title(row["arm"])
    rate.set_ylim(0)
    names = list(row["levels"])
    shares = [[100 * one["levels"][name] for one in seconds] for name in names]
    levels.stackplot(at, shares, colors=LEVELS[: len(names)], labels=names, step="mid")
    levels.set_ylim(0, 100)
    latency.semilogy(at, [one["p50"] for one in seconds], color=style.BLUE, label="median")
    latency.semilogy(at, [one["most"] for one in seconds], color=style.BROWN, lw=1, label="worst")
    latency.axhline(row["target"], color=style.GREY, ls="--", label="target")
    latency.set_xlabel("seconds")
    for axis in axes:
        axis.grid()
    if first:
        rate.set_ylabel("requests / s")
        levels.set_ylabel("answered at k, %")
        latency.set_ylabel("seconds to the answer")
        levels.legend(loc="lower left", fontsize=7, title="k", title_fontsize=7)
        latency.legend(loc="upper left", fontsize=7)
