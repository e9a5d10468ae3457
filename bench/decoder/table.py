"""The table on the screen and in the documentation."""

from ..harness.results import Row
from ..harness.tables import Column, key, mib, number
from .levels import UNTRAINED

TARGETS = {("ffn/2", 2): 1.0}
"""Points that a level may lose, at most, on the dev set."""


def columns(content: Row) -> list[Column]:
    """Of the tables on the screen and in the documentation."""
    settings = content["settings"]
    made = [
        Column("compressed", lambda row: row["where"] or "nothing, HF SDPA", True),
        key("dtype", "dtype"),
        key("prompt", "length"),
        Column("k", lambda row: str(row["k"]) if row["where"] else "", True),
        key("window", "window"),
        number("first token, s", lambda row: row["first"]["median"]),
        _over("over HF", "first"),
        number("cost bound", lambda row: row["bound"]),
    ]
    for size in settings["batches"]:
        name = f"batch {size}"
        made.append(_milliseconds(f"ms a token, {name}", name))
        made.append(_over("over HF", name))
    made += [
        mib("cache, MiB", "cache_bytes"),
        number("of HF", lambda row: row["cache_share"], ".0%"),
        mib(f"prefill of {settings['peak']}, MiB", "peak_bytes", ".0f"),
    ]
    kinds = dict.fromkeys(kind for row in content["rows"] for kind in row.get("perplexity", ()))
    named = [kind for kind in kinds if kind != UNTRAINED]
    for heading, of in ((UNTRAINED, [UNTRAINED]), (" or ".join(named), named)):
        made += [_perplexity(heading, of, str(n)) for n in settings["contexts"] if kinds and of]
    return made


def task_columns(content: Row) -> list[Column]:
    """The same of ``bench.decoder.task``."""

    def lost(row: Row) -> str:
        limit = TARGETS.get((row["where"], row["k"]))
        aim = "" if limit is None else f" (target {limit})"
        return f"{row['dev_lost']:.1f}{aim}" if row["where"] else ""

    made = [
        Column("compressed", lambda row: row["where"] or "nothing, HF SDPA", True),
        Column("k", lambda row: str(row["k"]) if row["where"] else "", True),
        number("right, dev, %", lambda row: 100 * row["dev"], ".1f"),
        Column("points lost", lost),
    ]
    if "test" in content["rows"][0]:
        made += [
            number("right, test, %", lambda row: 100 * row["test"], ".1f"),
            number(
                "points lost, test", lambda row: row["test_lost"] if row["where"] else None, ".1f"
            ),
        ]
    return [
        *made,
        key("seeds", "seeds"),
        number("multiply-adds left", lambda row: row.get("multiply_adds_left"), ".0%"),
        number("over HF", lambda row: row["speedup"]["median"]),
    ]


def _milliseconds(heading: str, name: str) -> Column:
    return number(heading, lambda row: row[name]["median"] * 1e3, ".1f")


def _perplexity(heading: str, kinds: list[str], context: str) -> Column:
    """Of the kind of plugins that a level has; there is at most one of those that were trained."""

    def read(row: Row) -> float | None:
        found = row.get("perplexity", {})
        mine: Row = next((found[kind] for kind in kinds if kind in found), {})
        return mine.get(context, {}).get("over_dense")

    return number(f"perplexity over dense, {heading}, {context} tokens", read, ".3f")


def _over(heading: str, name: str) -> Column:
    return number(heading, lambda row: row[name]["speedup"]["median"])
