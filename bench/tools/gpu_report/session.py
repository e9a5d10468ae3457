"""The report's measurements, one after the other, in a process of their own.

A kernel that crashes takes its process's GPU context along, and one that hangs never returns. So
:func:`outcomes` measures here, job by job, and :func:`followed` runs that in another process
(``python -m bench.tools.gpu_report.session``) and starts a new one behind the job that was lost.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import gpu
from bench.cases import Key, models
from bench.cases.sublayer import Sublayer
from bench.gpu import JOBS, Job
from bench.harness.clock import Graph
from bench.harness.runner import first_line

from .steps import TIME_UP, stop

Outcome = dict[str, Any]
# Seconds that a job may take, without and with compilers; that one with them is taken to need.
LIMITS, COMPILING = (120.0, 200.0), 75.0
# Of a job that began in time and did not end: it hung, or took longer than it was taken to.
UNFINISHED = "it was still running at the report's end"
BEGAN = "began"


def unmeasured(job: Job, reason: str) -> Outcome:
    return {"not_measured": [{**job._asdict(), "reason": reason[:500]}]}


def outcomes(
    jobs: Sequence[Job], device: str, rounds: int, until: float, dry: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:  # fmt: skip
    """What each job gave: ``rows``, ``kernels`` or ``not_measured``; the first has ``ceilings``.

    No job starts that would not end by ``until`` (``time.monotonic``), going by those before it,
    and none after one that broke the device's context.
    ``dry`` takes toy sizes and leaves the compilers out; ``begin`` is called before each job.
    """
    clock = Graph(device)
    ceilings, slowest = clock.ceilings(), [0.0, COMPILING]  # without and with compilers
    extra: Outcome = {"ceilings": ceilings}
    for job in jobs:
        print(f"{job.name} {job.model} {job.batch} x {job.length}", flush=True)
        began = time.monotonic()
        if began + slowest[job.compiles] > until:
            yield {**unmeasured(job, TIME_UP), **extra}
            continue
        begin()
        try:
            part = "kernels" if job.name == "kernels" else "rows"
            outcome: Outcome = {part: gpu.measure(job, clock, ceilings, rounds, dry)}
        except Exception as error:
            outcome = unmeasured(job, first_line(error))
        yield {**outcome, **extra}
        if not clock.works():
            return
        slowest[job.compiles] = max(slowest[job.compiles], time.monotonic() - began)
        extra = {}


def followed(
    jobs: Sequence[Job],
    command: Callable[[int, Path], list[str]],
    folder: Path,
    until: float,
    limits: tuple[float, float] = LIMITS,
) -> Iterator[Outcome]:
    """The outcomes that ``command(first job, file)`` writes to the file, a line each; a line
    before it says that a job began.

    A process that dies, or takes longer for a job than ``limits`` (without and with compilers),
    costs that job. One that ends in peace is followed by another for what it left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    while done < len(jobs):
        if time.monotonic() > until:
            yield from (unmeasured(job, TIME_UP) for job in jobs[done:])
            return
        first, why, path = done, "", folder / f"outcomes-{done}.jsonl"
        path.write_text("")
        process = subprocess.Popen(command(first, path), start_new_session=True)
        last, read, running = time.monotonic(), 0, False
        try:
            while True:
                ended = process.poll() is not None  # asked first: what is written then is all
                lines = path.read_text().split("\n")[:-1]  # without one that is still being written
                for line in lines[read:]:
                    outcome = json.loads(line)
                    read, running = read + 1, BEGAN in outcome
                    if not running:
                        yield outcome
                        done, last = done + 1, time.monotonic()
                if ended:
                    break
                now, limit = time.monotonic(), limits[jobs[min(done, len(jobs) - 1)].compiles]
                if now > until or now - last > limit:
                    why = TIME_UP if now > until else f"it took more than {limit:g} s"
                    stop(process)
                time.sleep(0.05)
        finally:
            stop(process)  # and what it started
        if done < len(jobs) and (process.returncode or done == first):
            if why == TIME_UP and running:
                why = UNFINISHED
            why = why or f"its process ended with code {process.returncode}"
            yield unmeasured(jobs[done], why)
            done += 1


def warm(name: str) -> None:
    """Compiles what ``max-autotune`` tries for a model's jobs.

    Most of its time goes to compiling candidates; the report does that beside its tests. Which one
    is the fastest is found out again when it is measured, alone on the GPU.
    """
    model = models.Architecture(name, models.SUBLAYERS[name](), None)
    for job in (job for job in JOBS if job.model == name and job.compiles):
        layer = Sublayer(model, "bf16", job.batch, job.length, device="cuda", kernels="triton")
        for arm in (arm for arm in job.arms if arm.endswith("-compiled")):
            for k in (None,) if arm.startswith("hf") else job.ratios:
                layer.build(Key(arm, k))()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--first", type=int, default=0, help="the first of the jobs (gpu.JOBS)")
    parser.add_argument("--until", type=float, default=float("inf"), help="no job that would end "
                        "behind this reading of time.monotonic()")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a file, which gets a JSON line a job")
    parser.add_argument("--warm", choices=models.SUBLAYERS, help="only compile this model's arms")
    chosen = parser.parse_args(arguments)
    if chosen.warm:
        return warm(chosen.warm)
    with chosen.output.open("a") as file:

        def write(line: Outcome) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        jobs = JOBS[chosen.first :]
        for outcome in outcomes(
            jobs, "cuda", chosen.rounds, chosen.until, begin=lambda: write({BEGAN: True})
        ):
            write(outcome)
    os._exit(0)  # a broken context could make an orderly end fail


if __name__ == "__main__":
    main()
