"""The blocks about speed and memory: one function each, from a machine's results."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import targets
from bench.harness import tables
from bench.harness.results import Row, pick, placements, speedup
from bench.harness.tables import Column, key, number
from bench.peers import table as peers


class Machine(NamedTuple):
    """One folder of results: files by benchmark name."""

    folder: Path
    files: dict[str, Row]

    def rows(self, benchmark: str = "speed_vs_k") -> list[Row]:
        return self.files.get(benchmark, {}).get("rows", [])

    def picture(self, name: str, text: str, folder: Path) -> str:
        """A figure, for a file in ``folder``."""
        path = os.path.relpath((self.folder / f"{name}.png").resolve(), folder)
        return f"![{text}]({Path(path).as_posix()})"


def named(found: Machine, start: str) -> dict[str, Row]:
    """The results whose names begin so, in their order."""
    return {name: found.files[name] for name in sorted(found.files) if name.startswith(start)}


def processor(content: Row) -> str:
    """The line above a table: where a result was measured."""
    here, settings = content["machine"], content["settings"]
    return (
        f"{here['cpu']} (family {here['family']}, model {here['model']}), {settings['threads']} "
        f"threads, kernels {here['kernels_isa']}:\n\n"
    )


def caption(found: Machine, folder: Path) -> str:
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


def figure(found: Machine, folder: Path) -> str:
    """The curve."""
    if "speed_vs_k" not in found.files:
        return ""
    return found.picture("speed_vs_k", "Speed-up against the compression ratio", folder)


def _cells(found: Machine, case: str) -> list[Any]:
    """The measured arms of each input and ratio of a case, by arm and padding."""
    cells: dict[tuple, dict[Any, Any]] = {}
    for row in (row for row in pick(found.rows(), case=case) if row["k"]):
        names = ("dtype", "batch", "length", "k")
        cell = cells.setdefault(tuple(row[n] for n in names), {n: row[n] for n in names})
        cell["bound"] = row["bound"]
        if row["status"] == "ok":
            cell[row["arm"], row["padding"]] = row
    return list(cells.values())


def _over(heading: str, arm: str, baseline: str) -> Column:
    of: Any = (arm, "none")
    return number(heading, lambda cell: speedup(cell.get(of), baseline))


DTYPE, K = key("dtype", "dtype"), key("k", "k")
SIZE = Column("tokens", lambda row: f"{row['batch']} x {row['length']}")
BOUND = number("cost bound", lambda row: row["bound"])
_PACKED = "dense-packed"
SUBLAYER = [
    DTYPE, K, BOUND, _over("eager PyTorch", "reference", _PACKED),
    _over("compiled PyTorch", "reference-compiled", _PACKED),
    _over("variator_kernels", "ours", _PACKED),
    _over("the same, compiled", "ours-compiled", _PACKED),
]  # fmt: skip
SMALL = [
    SIZE, DTYPE, K,
    _over("over dense, packed", "ours", _PACKED), _over("over eager PyTorch", "ours", "reference"),
]  # fmt: skip
BACKWARD = [
    DTYPE, K, _over("compiled PyTorch", "reference-compiled", "reference"),
    _over("variator_kernels", "ours", "reference"),
]  # fmt: skip
TIMED = [
    number("seconds", lambda row: row["median"]),
    number("over HF SDPA", lambda row: speedup(row, "hf-sdpa")),
]
ENCODER = [DTYPE, key("arm", "arm"), K, *TIMED, BOUND]
PLACEMENTS = [
    key("model", "model"), SIZE, DTYPE, K, Column("placements", placements), *TIMED,
    number("over ffn alone", lambda row: speedup(row, "ours, ffn")), BOUND,
]  # fmt: skip


def _nanoseconds(heading: str, padding: str) -> Column:
    of: Any = ("ours", padding)
    return number(heading, lambda cell: cell.get(of, {}).get("ns_per_token"), ".0f")


RAGGED = [
    DTYPE, K, _nanoseconds("full batch, ns a token", "none"),
    _nanoseconds("ragged batch, ns a real token", "ragged"),
]  # fmt: skip


def _of_cells(case: str, columns: list[Column]) -> Callable[[Machine, Path], str]:
    return lambda found, folder: tables.markdown(columns, _cells(found, case))


def encoder(found: Machine, folder: Path) -> str:
    """Seconds of the whole encoder by arm, FFNs alone compressed."""
    rows = pick(found.rows(), case="encoder", status="ok")
    return tables.markdown(ENCODER, [row for row in rows if placements(row) in ("", "ffn")])


def with_placements(found: Machine, folder: Path) -> str:
    """The encoder with plugins at each set of placements, of every file that has several."""
    rows: list[Row] = []
    where = ""
    for name, content in sorted(found.files.items()):
        some = pick(found.rows(name), case="encoder", arm="ours", status="ok")
        if len(set(map(placements, some))) > 1:
            rows += some
            where = processor(content)
    return where + tables.markdown(PLACEMENTS, rows)


def of_peers(found: Machine, folder: Path) -> str:
    """Every run of ``bench.peers``: where, a table of arms and inputs, what was not measured."""
    parts = []
    for name, content in named(found, "peers").items():
        here, model, settings = content["machine"], content["model"], content["settings"]
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        parts += [
            f"**{model['name']}**, weights {model['weights']}; {here['cpu']}, "
            f"{settings['threads']} threads; {versions}.",
            found.picture(name, f"{model['name']}: whole encoders", folder),
            peers.markdown(content),
        ]
    return "\n\n".join(parts)


def of_targets(found: Machine, folder: Path) -> str:
    """Every target beside its measurement, where the curve was measured."""
    if "speed_vs_k" not in found.files:
        return ""
    rows = [row for content in found.files.values() for row in content["rows"]]
    return tables.markdown(targets.columns(2), targets.as_rows(rows))


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "machine": caption, "figure": figure, "sublayer": _of_cells("sublayer", SUBLAYER),
    "small": _of_cells("small", SMALL), "encoder": encoder, "placements": with_placements,
    "backward": _of_cells("backward", BACKWARD), "ragged": _of_cells("ragged", RAGGED),
    "targets": of_targets, "peers": of_peers,
}  # fmt: skip
