"""The blocks of the README about training: quality against k, ablations, calibration, step time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .common.results import Row, pick
from .memory import MIB
from .quality.recipe import ABLATED, TARGETS
from .report_tables import Machine, markdown

ARMS = {
    "reference": "plain PyTorch, eager",
    "ours": "kernels",
    "ours-unpacked": "kernels, `--packed_products False`",
}


def _qualities(found: Machine) -> Iterator[tuple[str, str, Row]]:
    """Every file's stem, what it is of, and its content; the one with targets first."""
    names = sorted(name for name in found.files if name.startswith("quality_vs_k_"))
    for name in sorted(names, key=lambda name: not name.endswith("minilm_sst2")):
        content = found.files[name]
        yield name, f"{content['model']['name']}, {content['task']}", content


def figure(found: Machine, root: Path) -> str:
    """Accuracy against speed, of the first model and task."""
    for name, _, _ in _qualities(found):
        path = (found.folder / f"{name}.png").resolve().relative_to(root)
        return f"![Accuracy against measured speed]({path.as_posix()})"
    return ""


def quality(found: Machine, root: Path) -> str:
    """A row a model, task and k, of the full recipe."""
    lines = []
    for _, name, content in _qualities(found):
        for row in pick(content["summary"], variant="full"):
            limit = TARGETS.get(row["k"]) if name == "minilm, sst2" else None
            lost = f"{row['lost']:.1f}" + ("" if limit is None else f" (target {limit})")
            lines.append(
                [
                    name,
                    f"{100 * row['dense_accuracy']:.1f}",
                    str(row["k"]),
                    f"{100 * row['accuracy']:.1f}",
                    lost,
                    "" if row.get("test_lost") is None else f"{row['test_lost']:.1f}",
                    str(row["seeds"]),
                    f"{row['multiply_adds_left']:.0%}",
                    f"{row['added_over_ffn']:.1%}",
                    "" if row["speedup"] is None else f"{row['speedup']:.2f}",
                ]
            )
    names = ["original, %", "k", "compressed, %", "points lost", "points lost, test set", "seeds"]
    names += ["multiply-adds left", "parameters added to FFNs", "encoder speed-up"]
    return markdown(["model, task", *names], lines)


def ablation(found: Machine, root: Path) -> str:
    """Every variant at the ablations' k."""
    lines = []
    for _, name, content in _qualities(found):
        rows = [row for row in content["summary"] if row["k"] in ABLATED]
        for row in rows if len(rows) > 1 else []:
            numbers = [f"{row['lost']:.1f}", f"{row['loss']:.3f}", f"{row['added_over_ffn']:.1%}"]
            lines.append([name, row["variant"], *numbers])
    header = ["model, task", f"k={ABLATED[0]}", "points lost", "distillation loss", "added to FFNs"]
    return markdown(header, lines)


def calibration(found: Machine, root: Path) -> str:
    """The loss after ``vk.calibrate`` alone, over that of initial values, and what it takes."""
    lines = []
    for _, name, content in _qualities(found):
        cost: Row = content.get("calibration", {})
        for row in pick(content["summary"], variant="calibrated only"):
            k = row["k"]
            for before in pick(content["summary"], variant="untrained", k=k):
                losses = [f"{before['loss']:.3f}", f"{row['loss']:.3f}"]
                left = f"{row['loss'] / before['loss']:.2f}"
                size = f"{cost['rows']}, {cost['tokens']}"
                seconds = f"{cost['seconds'][str(k)]:.0f}"
                lines.append([name, str(k), *losses, left, size, seconds])
    names = ["loss untrained", "calibrated", "of untrained", "sequences, tokens", "seconds"]
    return markdown(["model, task", "k", *names], lines)


def step(found: Machine, root: Path) -> str:
    """Time and memory of a training step."""
    lines = [
        [
            f"{row['batch']} x {row['length']}",
            row["dtype"],
            ARMS[row["arm"]],
            f"{row['seconds']['median']:.3f}",
            f"{row['over_reference']['median']:.2f}",
            f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['packed_bytes'] / MIB:.0f}",
            f"{row['memory_over_reference']:.2f}",
        ]
        for row in pick(found.rows("training_speed"), status="ok")
    ]
    header = ["rows x tokens", "dtype", "a step, k=4", "seconds", "of plain PyTorch"]
    header += ["peak memory, MiB", "packed weights, MiB", "both, of plain PyTorch"]
    return markdown(header, lines)


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "quality-figure": figure,
    "quality": quality,
    "ablation": ablation,
    "calibration": calibration,
    "training-step": step,
}
