"""The table on the screen and in the documentation."""

from collections.abc import Iterable

from ..harness.results import Row
from ..harness.tables import Column, key, mib, number
from .levels import UNTRAINED

TARGETS = {("ffn/2", 2): 1.0}
"""Points that a level may lose, at most, on the dev set."""


def columns(content: Row) -> list[Column]:
    """Of the tables on the screen and in the documentation."""
    settings = content["settings"]
    bound = number("cost bound", lambda row: row["bound"])
    made = [
        Column("compressed", lambda row: row["where"] or "nothing, HF SDPA", True),
        key("dtype", "dtype"),
        key("prompt", "length"),
        Column("k", lambda row: str(row["k"]) if row["where"] else "", True),
        key("window", "window"),
    ]
    if settings.get("times", True):
        made += _times(settings, bound)
    else:
        made += [bound, mib("prompt's cache, MiB", "prompt_bytes")]
        made.append(number("of HF", lambda row: row["prompt_share"], ".0%"))
    of: dict[str, Iterable[str]] = {UNTRAINED: [UNTRAINED], **_trained(content["rows"])}
    if not any(UNTRAINED in row.get("perplexity", ()) and row["where"] for row in content["rows"]):
        del of[UNTRAINED]
    for heading, kinds in of.items():
        made += [_perplexity(heading, list(kinds), str(n)) for n in settings["contexts"]]
    return made


def _times(settings: Row, bound: Column) -> list[Column]:
    made = [
        number("first token, s", lambda row: row["first"]["median"]),
        _over("over HF", "first"),
        bound,
    ]
    for size in settings["batches"]:
        name = f"batch {size}"
        made.append(_milliseconds(f"ms a token, {name}", name))
        made.append(_over("over HF", name))
    return [
        *made,
        mib("cache, MiB", "cache_bytes"),
        number("of HF", lambda row: row["cache_share"], ".0%"),
        mib(f"prefill of {settings['peak']}, MiB", "peak_bytes", ".0f"),
    ]


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


def _trained(rows: list[Row]) -> dict[str, Iterable[str]]:
    """The kinds of plugins that were trained, under one heading."""
    every = dict.fromkeys(kind for row in rows for kind in row.get("perplexity", ()))
    every.pop(UNTRAINED, None)
    return {} if not every else {next(iter(every)) if len(every) == 1 else "trained": every}


def _perplexity(heading: str, kinds: list[str], context: str) -> Column:
    """Of each kind of plugins that a level has, with its name where there are several."""

    def cell(row: Row) -> str:
        found = row.get("perplexity", {})
        if not row["where"]:
            return format(found[UNTRAINED][context]["over_dense"], ".3f") if found else ""
        return ", ".join(
            f"{found[kind][context]['over_dense']:.3f}" + f" ({kind})" * (len(kinds) > 1)
            for kind in kinds
            if kind in found
        )

    return Column(f"perplexity over dense, {heading}, {context} tokens", cell)


def _over(heading: str, name: str) -> Column:
    return number(heading, lambda row: row[name]["speedup"]["median"])
