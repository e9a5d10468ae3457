"""A run as a picture."""

from itertools import zip_longest
from pathlib import Path

from ..harness import results
from ..harness.results import Row
from ..harness.style import BLUE, DENSE, ENCODER_NAMES, NAVY, bars, commit, sheet
from .table import SDPA, level

COLOURS = {
    (False, "fp32"): DENSE, (False, "bf16"): "#7b8fa6", (False, "int8"): "#52667d",
    (True, "fp32"): "#63b3ed", (True, "bf16"): BLUE, (True, "int8"): NAVY,
}  # fmt: skip
"""By whether it is ours, and dtype."""


def peers(content: Row, target: Path) -> None:
    """A panel an input, the fastest arm on top."""
    rows, here = content["rows"], content["machine"]
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    most = max(len(results.pick(rows, input=name)) for name in inputs)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    caption = (
        f"{here['cpu']}, {content['settings']['threads']} threads; weights "
        f"{content['model']['weights']}; commit {commit(content)}\n{versions}\nMedians of "
        "interleaved rounds, whiskers are quartiles; factors are over Hugging Face SDPA in fp32."
    )
    height, title = -(-len(inputs) // 2), f"{content['model']['name']}: whole encoders"
    size = (13, (0.27 * most + 1) * height + 0.8)
    with sheet(target, height, min(2, len(inputs)), size, title, caption) as grid:
        panels = [axes for line in grid for axes in line]
        for axes, name in zip_longest(panels, inputs):
            if name is None:
                axes.set_axis_off()
                continue
            found = sorted(results.pick(rows, input=name, status="ok"), key=lambda r: r["median"])
            cells = [(_named(row), COLOURS[bool(row["k"]), row["dtype"]], row) for row in found]
            bars(axes, cells, SDPA)
            axes.set_title(f"{name}: seconds a call")


def _named(row: Row) -> str:
    name = str(ENCODER_NAMES.get(row["arm"], row["arm"])).replace("\n", " ")
    return " ".join(filter(None, (name, row["dtype"], level(row))))
