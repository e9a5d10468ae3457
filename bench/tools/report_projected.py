"""The blocks about Projected Compression."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from bench.harness import tables
from bench.harness.results import Row, pick
from bench.projected import speed, step

from .report_speed import Machine, named, processor


def _losses(rows: list[Row]) -> list[Row]:
    """A row a start, training and budget: the mean over seeds."""
    made = []
    names = ("share", "start", "training", "tokens")
    for cell in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        some = pick(rows, **dict(zip(names, cell, strict=True)))
        excess = [row["excess"] for row in some]
        range_ = f" ({min(excess):+.3f} to {max(excess):+.3f})" if len(some) > 1 else ""
        about = {"loss": mean(row["loss"] for row in some), "seeds": len(some)}
        made.append(some[0] | about | {"over": f"{mean(excess):+.3f}{range_}"})
    return made


_LOSSES = [
    tables.Column("parameters", lambda row: f"{row['share']:.0%}"),
    tables.key("hidden", "hidden"),
    tables.key("FFN", "ffn"),
    tables.key("start", "start"),
    tables.Column("training", lambda row: row["training"] if row["tokens"] else ""),
    tables.Column("tokens", lambda row: f"{row['tokens']:,}" if row["tokens"] else ""),
    tables.Column("seeds", lambda row: str(row["seeds"]) if row["tokens"] else ""),
    tables.number("nats", lambda row: row["loss"], ".3f"),
    tables.Column("over the original", lambda row: row["over"]),
]


def of_projected(found: Machine, folder: Path) -> str:
    """Losses of every model, and its picture."""
    parts = []
    for name, content in named(found, "projected").items():
        if content["benchmark"] != "projected":
            continue
        model, rows = content["model"], pick(content["rows"], status="ok")
        text = f"{model['name']}: losses over the original's"
        table = tables.markdown(_LOSSES, _losses(rows))
        parts += [
            f"**{model['name']}**, {model['parameters']:,} parameters, {model['loss']:.3f} nats:",
            table, found.picture(name, text, folder),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _each(found: Machine, benchmark: str, columns: list[tables.Column]) -> str:
    """A table a result of this benchmark."""
    parts = []
    for content in named(found, "projected").values():
        if content["benchmark"] == benchmark:
            rows = pick(content["rows"], status="ok")
            parts.append(
                f"{content['model']['name']}; {processor(content)}{tables.markdown(columns, rows)}"
            )
    return "\n\n".join(parts)


def of_step(found: Machine, folder: Path) -> str:
    """Time and memory of a training step."""
    return _each(found, "projected_step", step.COLUMNS)


def of_speed(found: Machine, folder: Path) -> str:
    """Prefill and decoding of smaller models."""
    return _each(found, "projected_speed", speed.COLUMNS)


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "projected": of_projected, "projected-step": of_step, "projected-speed": of_speed,
}  # fmt: skip
