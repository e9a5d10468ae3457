"""What runs of ``bench.quality_vs_k`` come to: medians over seeds, their columns and targets."""

import statistics
from pathlib import Path

from rich.table import Table

from ..harness import results, tables
from ..harness.results import Row
from . import speed
from .recipe import TARGETS
from .rivals import rivals


def medians(rows: list[Row], costs: dict[int, Row], folder: Path) -> list[Row]:
    """Medians over seeds, with cost and speed beside them.

    ``folder``: of the original, whose FFNs the added parameters are compared with.
    """
    made = []
    for variant, k in dict.fromkeys((r["variant"], r["k"]) for r in rows):
        found = results.pick(rows, variant=variant, k=k)
        cost = costs[k]
        row: Row = {
            name: statistics.median(r[name] for r in found)
            for name in ("accuracy", "loss", "dense_accuracy")
        }
        lost = [r["dense_accuracy"] - r["accuracy"] for r in found]  # each seed's own original
        row["lost"] = 100 * statistics.median(lost)
        row["test_lost"] = None
        if all(r["test_accuracy"] is not None for r in found):
            lost = [r["test_dense_accuracy"] - r["test_accuracy"] for r in found]
            row["test_lost"] = 100 * statistics.median(lost)
        row |= {"variant": variant, "k": k, "seeds": len(found)}
        places = (results.ABSENT | found[0])["placements"]
        row["speedup"] = cost["speedup"]["median"] if cost["status"] == "ok" else None
        row["multiply_adds_left"] = cost["multiply_adds_left"]
        row["added_over_ffn"] = speed.added(folder, tuple(places), found[0]["bottleneck"], k)
        made.append(row)
    return made


def percent(heading: str, name: str) -> tables.Column:
    return tables.number(heading, lambda row: 100 * row[name], ".1f")


def columns(content: Row) -> list[tables.Column]:
    """Of the tables on the screen and in the documentation, without what the rows are of."""
    smaller = rivals(content["costs"])
    tokens = {row["k"]: row["tokens_a_row"] for row in content["costs"]}

    def lost(row: Row) -> str:
        limit = targets(content).get(row["k"]) if row["variant"] == "full" else None
        return f"{row['lost']:.1f}" + ("" if limit is None else f" (target {limit})")

    def pays(row: Row) -> str:
        if row["k"] not in smaller:
            return ""
        rival = smaller[row["k"]]
        return "yes" if rival is None else f"no, k={rival} is within the spread"

    return [
        percent("original, %", "dense_accuracy"),
        tables.number("tokens a row", lambda row: tokens[row["k"]], ".0f"),
        tables.key("k", "k"),
        percent("compressed, %", "accuracy"),
        tables.Column("points lost", lost),
        tables.number("points lost, test set", lambda row: row.get("test_lost"), ".1f"),
        tables.key("seeds", "seeds"),
        tables.number("multiply-adds left", lambda row: row["multiply_adds_left"], ".0%"),
        tables.number("parameters added to FFNs", lambda row: row["added_over_ffn"], ".1%"),
        tables.number("encoder speed-up", lambda row: row["speedup"]),
        tables.Column("pays at this length", pays),
    ]


def named(content: Row) -> str:
    """What a result is of; the default placements are not named."""
    where, first = results.placements(content["settings"]), content["settings"].get("keep_first")
    parts = [content["model"]["name"], content["task"]] + [where] * (where != "ffn")
    return ", ".join(parts + ([] if first is None else [f"first {first} kept"]))


def targets(content: Row) -> dict[int, float]:
    """Points that a result may lose, by ratio: targets are of one model and task."""
    of = (content["model"]["name"], content["task"]) == ("minilm", "sst2")
    places = (results.ABSENT | content["settings"])["placements"]
    return TARGETS.get(tuple(places), {}) if of else {}


def side_by_side(contents: list[Row]) -> Table:
    """What trained plugins lose, of several results."""
    rows = [
        row | {"of": named(content)}
        for content in contents
        for row in content["summary"]
        if row["variant"] == "full" or all(r["variant"] != "full" for r in content["summary"])
    ]
    shown = [
        tables.key("result", "of"),
        tables.key("variant", "variant"),
        tables.key("k", "k"),
        tables.number("points lost", lambda row: row["lost"], ".1f"),
        tables.number("points lost, test set", lambda row: row.get("test_lost"), ".1f"),
        tables.key("seeds", "seeds"),
        tables.number("multiply-adds left", lambda row: row["multiply_adds_left"], ".0%"),
        tables.number("encoder speed-up", lambda row: row["speedup"]),
    ]
    return tables.screen("medians over seeds", shown, rows, section="of")
