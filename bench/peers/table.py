"""The rows of a run beside each other: which peer is the fastest, and by what ours beats it."""

from collections.abc import Iterable
from functools import partial

from ..cases.encoder import PLUGIN_ARMS
from ..harness import tables
from ..harness.results import Row, pick, placements, speedup
from ..harness.tables import Column, key, number

SDPA = "hf-sdpa fp32"


def ours(row: Row) -> bool:
    return row["arm"] in PLUGIN_ARMS


def fastest(rows: Iterable[Row]) -> str | None:
    """The name of the peer with the least median, as speed-ups have it."""
    peers = [row for row in rows if row["status"] == "ok" and not ours(row)]
    best = min(peers, key=lambda row: row["median"], default=None)
    return f"{best['arm']} {best['dtype']}" if best else None


def mark(rows: list[Row], given: str) -> None:
    """Say in each row what its input is called and, of one input's rows, which peers to beat."""
    peers = {"peer": fastest(rows), "peer_fp32": fastest(pick(rows, dtype="fp32"))}
    for row in rows:
        row.update(input=given, **peers)


def over(row: Row, peer: str) -> float | None:
    """The speed-up of one of ours over the fastest peer in its rounds."""
    return speedup(row, row[peer]) if ours(row) else None


def level(row: Row) -> str:
    """Our ratio, and where plugins are."""
    if row["k"] == 1:
        return "k=1"
    return f"k={row['k']}, {placements(row)}" if row["k"] else ""


ARM = [key("arm", "arm"), key("dtype", "dtype"), Column("plugins", level, True)]
SCREEN = [
    Column("arm", lambda row: _named(row), True),
    Column("ms", tables.milliseconds),
    number("/ SDPA", lambda row: speedup(row, SDPA)),
    number("/ fp32 peer", lambda row: over(row, "peer_fp32")),
    number("/ peer", lambda row: over(row, "peer")),
    number("bound", lambda row: row["bound"]),
    number("rel. error", lambda row: row["relative"], ".1e"),
]  # fmt: skip
"""Speed-ups are over Hugging Face's SDPA in fp32, the fastest peer in fp32, and the fastest."""


def markdown(content: Row) -> str:
    """A line an arm, a column an input: milliseconds, and in parentheses the speed-up over the
    fastest peer at that input. What has no number is listed with the reason."""
    inputs = list(dict.fromkeys(row["input"] for row in content["rows"]))
    lines: dict[str, Row] = {}
    reasons: dict[str, list[str]] = {}
    for row in content["rows"]:
        name = _named(row)
        line = lines.setdefault(name, {n: row[n] for n in ("arm", "dtype", "k", "placements")})
        if row["status"] == "ok":
            line[row["input"]] = row
        else:
            reasons.setdefault(f"{name}: {row['reason']}", []).append(row["input"])
    columns = [*ARM, Column("relative error", partial(_worst, inputs))]
    columns += [Column(name, partial(_cell, name)) for name in inputs]
    measured = [line for line in lines.values() if not line.keys().isdisjoint(inputs)]
    missing = "\n".join(f"- {text} ({', '.join(where)})" for text, where in reasons.items())
    parts = [tables.markdown(columns, measured), missing and f"Without a number:\n\n{missing}"]
    return "\n\n".join(filter(None, parts))


def _named(row: Row) -> str:
    return " ".join(filter(None, (column.cell(row) for column in ARM)))


def _worst(inputs: list[str], line: Row) -> str:
    return f"{max(line[name]['relative'] for name in inputs if name in line):.1e}"


def _cell(name: str, line: Row) -> str:
    row = line.get(name)
    if row is None:
        return ""
    factor = over(row, "peer")
    text = f"{row['median'] * 1e3:.3g}" if row["median"] < 1 else f"{row['median'] * 1e3:.0f}"
    return text + (f" ({factor:.2f}x)" if factor else "")
