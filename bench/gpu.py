"""What the GPU report measures: its jobs, its targets, and one job's rows.

``python -m bench.tools.gpu_report`` runs all of it unattended.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.table import Table

from variator_kernels import backends

from . import predictions
from .cases import Case, attention, kernels, models, products
from .cases.sublayer import LAUNCHES, Sublayer
from .harness import tables
from .harness.clock import Eager, Graph
from .harness.results import Row
from .harness.runner import run

EAGER = ("hf", "reference", "ours")
ALL = ("hf", "hf-compiled", "reference", "reference-compiled", "ours")
BACKWARD = ("reference", "ours")
ATTENTION = (attention.SDPA, attention.REFERENCE, attention.OURS)
RATIOS = (2, 4, 8, 16, 32)


class Job(NamedTuple):
    """One table of the report: arms of one sublayer at one size, or each kernel alone, attention
    over merged keys, or the FFN's products."""

    name: str
    model: str
    batch: int
    length: int
    ratios: tuple[int, ...] = (4,)
    arms: tuple[str, ...] = EAGER

    @property
    def compiles(self) -> bool:
        """Whether an arm needs a compiler that tries out variants: a minute or more."""
        return any(arm.endswith("-compiled") for arm in self.arms)


# Most wanted first: the report stops starting jobs when its time is up. What takes a minute a job
# comes last.
JOBS = (
    Job("target", "t5-base", 32, 512, (4,), ALL),
    Job("curve", "t5-base", 32, 512, RATIOS),
    Job("backward", "t5-base", 32, 512, (4,), BACKWARD),
    Job("sizes", "t5-large", 32, 512),
    Job("sizes", "llama-7b", 8, 2048, (2, 4)),
    Job("sizes", "bert-base", 32, 512),
    Job("small", "t5-base", 1, 128),
    Job("small", "t5-base", 1, 512),
    Job("small", "t5-base", 2, 512),
    Job("small", "t5-base", 4, 512),
    Job("backward", "t5-base", 32, 512, (2, 8, 16, 32), BACKWARD),
    Job("kernels", "t5-base", 32, 512),
    Job("kernels", "t5-base", 1, 512),
    # BERT's sublayer is no case there: its norm is behind it.
    Job("kernels", "t5-large", 32, 512),
    Job("kernels", "llama-7b", 8, 2048),
    Job("attention", "t5-base", 32, 512, (4, 1), ATTENTION),
    Job("attention", "bert-base", 32, 512, (4, 1), ATTENTION),
    Job("attention", "t5-base", 8, 2048, (4,), ATTENTION),
    Job("attention", "bert-base", 8, 2048, (4,), ATTENTION),
    Job("products", "t5-base", 32, 512, (4,), products.ARMS),
    Job("products", "llama-7b", 8, 2048, (4,), products.ARMS),
    Job("target", "t5-large", 32, 512, (4,), ALL),
    Job("target", "llama-7b", 8, 2048, (4,), ALL),
    Job("target", "bert-base", 32, 512, (4,), ALL),
    Job("target", "llama-7b", 8, 2048, (2,), ALL),
)


ALONE = "alone"


class Target(NamedTuple):
    """A bound on a ratio within one case: ``of`` against an arm, or over the floor; of a kernel
    alone, its floor or predicted bound over its time."""

    what: str
    case: str
    arm: str
    limit: float
    at_least: bool = True
    of: str = "ours"
    least: int = 0
    """Tokens: with fewer a launch takes longer than the bytes of a kernel alone."""


TARGETS = (
    Target("against Hugging Face's sublayer, eager", "target", "hf", 3.5),
    Target("against the dense sublayer, max-autotune", "target", "hf-compiled", 2.5),
    Target("against the eager reference", "target", "reference", 2.2),
    Target("against the reference, max-autotune", "target", "reference-compiled", 1.5),
    Target("time over the floor", "target", "floor", 1.4, False),
    Target("forward and backward against the eager reference", "backward", "reference", 1.5),
    Target("peak memory of forward and backward, of the reference's", "backward", "memory", 1.0,
           False),
    Target("CUDA, against the dense sublayer, max-autotune", "target", "hf-compiled", 2.8,
           of="cuda"),
    Target("CUDA, time over the floor", "target", "floor", 1.25, False, "cuda"),
    Target("CUDA, one launch against several", "small", "cuda-launches", 1.5, of="cuda"),
    *(Target("merge and decompress alone: at least 85 % of the copy bandwidth or of their "
             "predicted bound", kernel, ALONE, 0.85, of=backend, least=2**14)
      for kernel in ("group_merge", "adapter_decompress") for backend in ("triton", "cuda")),
)  # fmt: skip


def usable() -> tuple[str, ...]:
    """The GPU backends that can run here, ``triton`` first."""
    return tuple(s.name for s in backends.status() if s.usable and s.name in ("triton", "cuda"))


def measure(
    job: Job, clock: Graph, ceilings: dict[str, float], rounds: int, dry: bool = False
) -> list[Row]:
    """A row an arm and ratio; one without a green check has no number.

    ``dry`` takes toy sizes and leaves the compilers out. An arm that is not available failed; of
    products it is skipped, because chips differ in what they multiply.
    """
    clocks, strict = [clock, Eager(clock.device)], job.name != "products"
    made = (
        run(case, clocks, rounds, ceilings=ceilings, strict=strict)
        for case in cases(job, clock.device, dry)
    )
    return [row for rows in made for row in rows]


def cases(job: Job, device: str, dry: bool) -> list[Case]:
    """What a job measures."""
    found = usable()
    backend = "triton" if "triton" in found else "reference"
    model = models.Architecture(job.model, models.SUBLAYERS[job.model](), None)
    arms = job.arms
    if dry:
        model, job = models.toy(model), job._replace(batch=1, length=16, ratios=job.ratios[:1])
        arms = tuple(arm for arm in arms if not arm.endswith("-compiled"))
    size = (job.batch, job.length)
    if job.name == "products":
        return [c for k in job.ratios for c in products.cases(model, *size, k, device, arms)]
    if job.name == "attention":
        terms = next(terms for terms, name in attention.MODELS.items() if name == job.model)
        if backend == "reference" and not dry:  # it has an arm
            arms = tuple(arm for arm in arms if arm != attention.OURS)
        works = (attention.Work(terms, "bf16", *size, k, device, backend) for k in job.ratios)
        return [attention.case(work, job.name, "bf16", arms) for work in works]
    layer = Sublayer(model, "bf16", *size, device=device, kernels=backend)
    if job.name == "kernels":
        names = {name: name for name in found}
        return [c for k in job.ratios for c in kernels.cases(layer, k, names, kernels.NAMES)]
    if "cuda" in found:
        arms = (*arms, "cuda")
        if job.name in ("small", "curve"):  # where the choice turns over
            arms = (*arms, *LAUNCHES)
    return [layer.case(arms, job.ratios, job.name)]


def measured(row: Row, arm: str, share: float | None = None) -> float | None:
    """The ratio that a target speaks of, in one row of its own arm; ``share``: of the predicted
    bound over the time."""
    if arm in ("floor", "memory"):
        return row.get("over_floor" if arm == "floor" else "memory_of_reference")
    if arm == ALONE:
        shares = [share, 1 / row["over_floor"] if "over_floor" in row else None]
        return max((found for found in shares if found is not None), default=None)
    found = row.get("speedup", {}).get(arm)
    return found["median"] if found else None


def verdicts(
    rows: list[Row], alone: Iterable[Row] = (), predicted: Iterable[Row] = ()
) -> list[Row]:
    """A row a target and case; ``value`` is None where nothing was measured.

    ``alone`` are the rows of single kernels, ``predicted`` those of :func:`predictions.compared`.
    """
    made, shares = [], {predictions.key(row): row["share"] for row in predicted}
    for target in TARGETS:
        for row in alone if target.arm == ALONE else rows:
            few = row["batch"] * row["length"] < target.least
            if few or (row["case"], row["arm"]) != (target.case, target.of):
                continue
            value, met = measured(row, target.arm, shares.get(predictions.key(row))), None
            if value is not None:
                met = value >= target.limit if target.at_least else value <= target.limit
            where = f"{row['model']}, {row['batch']} x {row['length']}, k={row['k']}"
            if target.arm == ALONE:
                where += f", {row['case']} on {row['arm']}"
            made.append({**target._asdict(), "where": where, "value": value, "met": met})
    return made


def shown(report: Row) -> list[Table]:
    """The report on the screen."""
    groups: dict[Any, list[Row]] = {}
    for row in [*report["rows"], *report["kernels"]]:
        title = (row["case"], row["model"], row["batch"], row["length"])
        groups.setdefault(title, []).append(row)
    made = [tables.timed("{}, {}, {} x {}".format(*title), rows) for title, rows in groups.items()]
    predicted = report.get("predictions", [])
    if predicted:
        name = "single kernels and their predicted bounds"
        made.append(
            tables.screen(name, predictions.COLUMNS, predicted, note=lambda row: row["note"])
        )
    signs = {True: ">=", False: "<="}
    words = {None: "not measured", True: "met", False: "MISSED"}
    columns = [
        tables.key("where", "where"),
        tables.key("target", "what"),
        tables.Column("limit", lambda row: f"{signs[row['at_least']]} {row['limit']}"),
        tables.number("measured", lambda row: row["value"]),
        tables.Column("", lambda row: words[row["met"]]),
    ]
    found = verdicts(report["rows"], report["kernels"], predicted)
    return [*made, tables.screen("targets", columns, found)]
