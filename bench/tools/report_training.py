"""The blocks about training: quality against k, ablations, calibration, time of a step."""

from collections.abc import Callable, Iterator
from pathlib import Path

from bench import calibration as of_calibration
from bench import training_speed
from bench.harness import tables
from bench.harness.results import Row, pick
from bench.harness.tables import key, number
from bench.methods import figure as of_methods
from bench.quality import embeddings as of_embeddings
from bench.quality import summary
from bench.quality.recipe import ABLATED
from bench.tools.report_speed import Machine


def _qualities(found: Machine) -> Iterator[tuple[str, Row]]:
    """Every file's stem and content; the one with most targets first."""
    files = {name: found.files[name] for name in sorted(found.files) if name.startswith(QUALITY)}
    yield from sorted(files.items(), key=lambda item: -len(summary.targets(item[1])))


def _named(content: Row, rows: list[Row]) -> list[Row]:
    return [{**row, "of": summary.named(content)} for row in rows]


def figure(found: Machine, folder: Path) -> str:
    """Accuracy against speed, of the first model and task that have a curve."""
    for name, content in _qualities(found):
        if len(content["costs"]) > 1:
            return found.picture(name, "Accuracy against measured speed", folder)
    return ""


QUALITY = "quality_vs_k_"
OF = key("model, task", "of")
LOSS = number("distillation loss", lambda row: row["loss"], ".3f")
ADDED = number("added to FFNs", lambda row: row["added_over_ffn"], ".1%")
LOST = number("points lost", lambda row: row["lost"], ".1f")
ABLATION = [OF, key(f"k={ABLATED[0]}", "variant"), LOST, LOSS, ADDED]
CALIBRATION = [
    OF,
    key("k", "k"),
    number("loss untrained", lambda row: row["before"], ".3f"),
    number("calibrated", lambda row: row["loss"], ".3f"),
    number("of untrained", lambda row: row["loss"] / row["before"]),
    tables.Column("sequences, tokens", lambda row: f"{row['rows']}, {row['tokens']}"),
    number("seconds", lambda row: row["seconds"][str(row["k"])], ".0f"),
    number("all ratios at once", lambda row: row["seconds"].get("all"), ".0f"),
]


def quality(found: Machine, folder: Path) -> str:
    """A row a model, task and k, of the full recipe."""
    lines: list[str] = []
    for _, content in _qualities(found):
        columns = [OF, *summary.columns(content)]
        rows = _named(content, pick(content["summary"], variant="full"))
        made = tables.markdown(columns, rows).splitlines()
        lines += made[2:] if lines else made
    return "\n".join(lines)


def ablation(found: Machine, folder: Path) -> str:
    """Every variant at the ablations' k."""
    rows = []
    for _, content in _qualities(found):
        some = [row for row in content["summary"] if row["k"] in ABLATED]
        rows += _named(content, some) if len(some) > 1 else []
    return tables.markdown(ABLATION, rows)


def calibration(found: Machine, folder: Path) -> str:
    """The loss after ``vk.calibrate`` alone, over that of initial values, and what it takes."""
    rows = []
    for _, content in _qualities(found):
        for row in _named(content, pick(content["summary"], variant="calibrated only")):
            for before in pick(content["summary"], variant="untrained", k=row["k"]):
                rows.append({**row, **content["calibration"], "before": before["loss"]})
    return tables.markdown(CALIBRATION, rows)


def unseen(found: Machine, folder: Path) -> str:
    """Errors on text that calibration did not see, a part a model."""
    parts = []
    for name, content in sorted(found.files.items()):
        if name.startswith("calibration_"):
            settings, model = content["settings"], content["model"]["name"]
            parts.append(
                f"{model}; {content['machine']['cpu']}, {settings['threads']} threads, kernels "
                f"{content['machine']['kernels_isa']}; {settings['unseen']} unseen paragraphs:"
            )
            made = of_calibration.lines(content["rows"], model)
            parts.append(tables.markdown(of_calibration.COLUMNS, made))
    return "\n\n".join(parts)


def embeddings(found: Machine, folder: Path) -> str:
    """A row a kind of text, set of plugins and k."""
    parts = [
        tables.markdown(of_embeddings.columns(content), content["summary"])
        for name, content in sorted(found.files.items())
        if name.startswith("quality_embeddings_")
    ]
    return "\n\n".join(parts)


def embeddings_figure(found: Machine, folder: Path) -> str:
    """Embeddings against speed."""
    names = sorted(name for name in found.files if name.startswith("quality_embeddings_"))
    text = "Nearness to the original's embeddings against measured speed"
    return "\n".join(found.picture(name, text, folder) for name in names)


def methods(found: Machine, folder: Path) -> str:
    """Every run of ``bench.methods``: what was equal, a row a method and setting, the picture."""
    parts = []
    for name, content in sorted(found.files.items()):
        if not name.startswith("methods_"):
            continue
        settings, here = content["settings"], content["machine"]
        parts += [
            f"**{content['model']['name']}, {content['task']}**: {settings['steps']} steps of "
            f"{settings['batch']} rows, medians of {settings['seeds']} seeds where trained; "
            f"{here['cpu']}, {settings['threads']} threads, kernels {here['kernels_isa']}.",
            found.picture(name, f"{content['score'].capitalize()} against measured speed", folder),
            tables.markdown(
                of_methods.columns(content["score"]), pick(content["summary"], status="ok")
            ),
        ]
    return "\n\n".join(parts)


def step(found: Machine, folder: Path) -> str:
    """Time and memory of a training step."""
    return tables.markdown(training_speed.COLUMNS, pick(found.rows("training_speed"), status="ok"))


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "quality-figure": figure,
    "quality": quality,
    "ablation": ablation,
    "calibration": calibration,
    "calibration-unseen": unseen,
    "embeddings": embeddings,
    "embeddings-figure": embeddings_figure,
    "methods": methods,
    "training-step": step,
}
