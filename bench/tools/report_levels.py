"""The blocks about levels that are switched: plans, a server under load, the time of a switch."""

from collections.abc import Callable
from pathlib import Path

from bench import overhead, plans
from bench.dynamic_load import table as load
from bench.harness import tables
from bench.harness.results import pick
from bench.tools.report_speed import Machine, named

LOAD = {
    "trace": load.TRACE, "bursts": load.BURSTS, "soak": load.SOAK, "simulation": load.SIMULATION
}  # fmt: skip


def of_plans(found: Machine, folder: Path) -> str:
    """Every run of ``bench.plans``: a row a level, and its picture."""
    parts = []
    for name, content in named(found, "plans_").items():
        settings = content["settings"]
        what = f"{content['model']['name']}, {' + '.join(settings['placements'])}"
        rows = pick(content["rows"], status="ok")
        columns = [c for c in plans.COLUMNS if any(c.cell(row) for row in rows)]
        parts += [
            f"{what}, plugins: {settings['plugins']}",
            tables.markdown(columns, rows),
            found.picture(name, "Loss against cost, plans and uniform ratios", folder),
        ]
    return "\n\n".join(parts)


def of_load(found: Machine, folder: Path) -> str:
    """Every run of ``bench.dynamic_load``: where, and a table a part."""
    parts = []
    for content in named(found, "dynamic_load").values():
        here, settings = content["machine"], content["settings"]
        parts.append(
            f"{here['cpu']}, {here['cores']} cores, {settings['threads']} for the model, kernels "
            f"{here['kernels_isa']}; the dense model serves {content['capacity']:.0f} requests a "
            f"second, the target is {1e3 * content['target']:.0f} ms:"
        )
        for case, columns in LOAD.items():
            if rows := pick(content["rows"], case=case, status="ok"):
                parts.append(tables.markdown(columns, rows))
    return "\n\n".join(parts)


def load_figure(found: Machine, folder: Path) -> str:
    """Rate, level and latency over time."""
    if "dynamic_load" not in found.files:
        return ""
    return found.picture("dynamic_load", "Rate, level and latency over time", folder)


def of_switching(found: Machine, folder: Path) -> str:
    """What a switch takes, and a controller's part of a batch."""
    rows = [r for r in found.rows("overhead") if r["case"] in ("switch", "controller")]
    asked = tables.number("asked at most, µs", lambda row: row["limit"], ".0f")
    columns = [column for column in overhead.COLUMNS if column.heading != "op, µs"]
    return tables.markdown([*columns, asked], pick(rows, status="ok"))


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "plans": of_plans, "load": of_load, "load-figure": load_figure, "switching": of_switching,
}  # fmt: skip
