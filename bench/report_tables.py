"""The blocks of the README that hold numbers: one function each, from a machine's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .common import results
from .common.results import Row, one, pick
from .memory import MIB, share_of_dense
from .targets import verdicts

SUBLAYER_ARMS = ("reference", "reference-compiled", "ours", "ours-compiled")


class Machine(NamedTuple):
    """One folder of results: files by benchmark name."""

    folder: Path
    files: dict[str, Row]

    def rows(self, benchmark: str = "speed_vs_k") -> list[Row]:
        return self.files.get(benchmark, {}).get("rows", [])


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table; empty if it has no line."""
    if not lines:
        return ""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def caption(found: Machine, root: Path) -> str:
    """Where the numbers come from."""
    content = found.files.get("speed_vs_k")
    if content is None:
        return ""
    here, model, settings = content["machine"], content["model"], content["settings"]
    versions, git = content["versions"], content["git"]
    commit = (git["commit"] or "none")[:9] + (" with local changes" if git["dirty"] else "")
    return (
        f"{here['cpu']}, {here['cores']} cores, {settings['threads']} threads, kernels "
        f"{here['kernels_isa'] or 'not built'}; {model['name']}, weights {model['weights']}, "
        f"{settings['batch']} x {settings['length']} tokens; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; commit {commit}. Medians of interleaved "
        "rounds; a sublayer's timed call follows an untimed one of the same arm; the process keeps "
        "freed memory and takes large pages, for every arm."
    )


def figure(found: Machine, root: Path) -> str:
    """The curve."""
    path = found.folder / "speed_vs_k.png"
    if "speed_vs_k" not in found.files:
        return ""
    name = path.resolve().relative_to(root).as_posix()
    return f"![Speed-up against the compression ratio]({name})"


def times(row: Row | None, baseline: str) -> str:
    """A speed-up, or nothing."""
    value = results.speedup(row, baseline)
    return "" if value is None else f"{value:.2f}"


def _cells(found: Machine, case: str) -> list[tuple[str, int, int, int]]:
    """Dtype, batch, length and k of a case's plugin rows, each once."""
    keys = ((r["dtype"], r["batch"], r["length"], r["k"]) for r in pick(found.rows(), case=case))
    return list(dict.fromkeys(key for key in keys if key[3]))


def sublayer(found: Machine, root: Path) -> str:
    """Speed-up over dense with packed weights, by k."""
    lines = []
    for dtype, _, _, k in _cells(found, "sublayer"):
        wanted = {"case": "sublayer", "dtype": dtype, "k": k}
        speeds = [times(one(found.rows(), arm=a, **wanted), "dense-packed") for a in SUBLAYER_ARMS]
        bound = pick(found.rows(), **wanted)[0]["bound"]
        lines.append([dtype, str(k), f"{bound:.2f}", *speeds])
    names = ["eager PyTorch", "compiled PyTorch", "variator_kernels", "the same, compiled"]
    return markdown(["dtype", "k", "cost bound", *names], lines)


def small(found: Machine, root: Path) -> str:
    """Small inputs: over dense, and over the eager reference."""
    lines = []
    for dtype, batch, length, k in _cells(found, "small"):
        wanted = {"case": "small", "dtype": dtype, "batch": batch, "length": length, "k": k}
        ours = one(found.rows(), arm="ours", **wanted)
        speeds = [times(ours, "dense-packed"), times(ours, "reference")]
        lines.append([f"{batch} x {length}", dtype, str(k), *speeds])
    return markdown(["tokens", "dtype", "k", "over dense, packed", "over eager PyTorch"], lines)


def encoder(found: Machine, root: Path) -> str:
    """Seconds of the whole encoder by arm."""
    lines = []
    for row in pick(found.rows(), case="encoder", status="ok"):
        k, bound = str(row["k"] or ""), f"{row['bound']:.2f}" if row["bound"] else ""
        seconds, speed = f"{row['median']:.2f}", times(row, "hf-sdpa")
        lines.append([row["dtype"], row["arm"], k, seconds, speed, bound])
    return markdown(["dtype", "arm", "k", "seconds", "over HF SDPA", "cost bound"], lines)


def backward(found: Machine, root: Path) -> str:
    """Forward and backward of the plugin, over the eager reference."""
    lines = []
    for dtype, _, _, k in _cells(found, "backward"):
        wanted = {"case": "backward", "dtype": dtype, "k": k}
        arms = ("reference-compiled", "ours")
        speeds = [times(one(found.rows(), arm=arm, **wanted), "reference") for arm in arms]
        lines.append([dtype, str(k), *speeds])
    return markdown(["dtype", "k", "compiled PyTorch", "variator_kernels"], lines)


def ragged(found: Machine, root: Path) -> str:
    """Nanoseconds a real token, full and ragged."""
    lines = []
    for dtype, _, _, k in _cells(found, "ragged"):
        wanted = {"case": "ragged", "dtype": dtype, "k": k, "arm": "ours"}
        pair = [one(found.rows(), padding=padding, **wanted) for padding in ("none", "ragged")]
        lines.append([dtype, str(k), *(f"{r['ns_per_token']:.0f}" if r else "" for r in pair)])
    header = ["dtype", "k", "full batch, ns a token", "ragged batch, ns a real token"]
    return markdown(header, lines)


def memory(found: Machine, root: Path) -> str:
    """Temporary memory and its share of the dense sublayer's."""
    rows, lines = found.rows("memory"), []
    for row in pick(rows, status="ok"):
        share = share_of_dense(rows, row)
        mib = [f"{row[key] / MIB:.1f}" for key in ("temporary_bytes", "largest_bytes")]
        process = "" if row["process_bytes"] is None else f"{row['process_bytes'] / MIB:.1f}"
        name = f"{row['arm']}, k={row['k']}" if row["k"] else row["arm"]
        part = f"{share:.0%}" if share else ""
        lines.append([row["direction"], row["dtype"], name, mib[0], part, mib[1], process])
    names = ["temporary, MiB", "of HF dense", "largest array, MiB", "process growth, MiB"]
    return markdown(["direction", "dtype", "arm", *names], lines)


def targets(found: Machine, root: Path) -> str:
    """Every target beside its measurement."""
    rows = [row for content in found.files.values() for row in content["rows"]]
    lines = []
    for target, value, verdict in verdicts(rows):
        limit = f"{'at most' if target.at_most else 'at least'} {target.limit:g}"
        lines.append([target.text, limit, "" if value is None else f"{value:.2f}", verdict])
    return markdown(["target", "limit", "measured", ""], lines) if rows else ""


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "machine": caption,
    "figure": figure,
    "sublayer": sublayer,
    "small": small,
    "encoder": encoder,
    "backward": backward,
    "ragged": ragged,
    "memory": memory,
    "targets": targets,
}
