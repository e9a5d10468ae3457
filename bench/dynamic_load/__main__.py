"""A server whose load comes in bursts: fixed levels against the controller.

The server of ``examples/serve`` runs in a process of its own on 127.0.0.1; this process sends
SST-2's dev sentences at times drawn beforehand and counts from these times, whatever the server
does. Both share the machine. Fixed levels are asked for by each request. An arm with a lost
request, or an answer that is not the model's at the level that the reply names, has no numbers,
and the exit code is 1.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from examples.serve.engine import Engine
from examples.serve.prepare import OUTPUT
from examples.serve.settings import Settings

from ..harness import machine, options, results
from ..harness.results import Row
from . import bursts, figure, generator, simulation, soak, summary, table, trace
from .answers import Truth, truth
from .server import KINDS, Server, running

PARTS = ("trace", "simulation", "bursts", "soak")
ALLOWANCE = 4.0
"""The target over the dense model's 99th percentile at half load."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("dynamic_load", __doc__, threads=1)
    add = made.add_argument
    add("--parts", type=options.words, default=["trace", "simulation"],
        help="of trace, simulation, bursts, soak; default trace,simulation")  # fmt: skip
    add("--server", choices=KINDS, default="fastapi", help="default fastapi")
    add("--folder", type=Path, default=OUTPUT, help="of examples.serve.prepare; build/serve")
    add("--data", type=Path, default=machine.DATA / "sst2", help="folder with dev.tsv")
    add("--levels", type=options.words, default=["1", "2", "4"], help="default 1,2,4")
    add("--seconds", type=float, default=30.0, help="of each of the three phases; default 30")
    add("--burst", type=float, default=1.3, help="times what dense can serve; default 1.3")
    add("--soak", type=float, default=600.0, help="seconds at the burst's load; default 600")
    add("--target", type=float, help="seconds; default 4 times dense p99 at half load")
    add("--quick", action="store_true", help="little work: does everything run?")
    return made


class Run(ExitStack):
    """What holds for all parts; at its end the controlled server is stopped."""

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        super().__init__()
        self.args, self.log = args, log
        self._controlled: Server | None = None
        folder = args.folder
        if not (folder / "plugins" / "plugins.json").is_file():
            raise ValueError(
                f"folder {folder} holds no plugins: python -m examples.serve.prepare makes them"
            )
        self.settings = {
            "model": folder / "model", "plugins": folder / "plugins", "threads": args.threads,
            "profile": folder / f"profile_{args.threads}.json", "levels": ",".join(args.levels),
        }  # fmt: skip
        given: Any = {k: v if isinstance(v, int) else str(v) for k, v in self.settings.items()}
        engine = Engine(Settings(**given))
        self.dense = args.levels[0]
        self.times = engine.controller.times
        self.truth: Truth = truth(engine, args.data, 60 if args.quick else None)
        self.batch_tokens = engine.settings.batch_tokens
        self.capacity = self.target = 0.0
        self.slowdown = 1.0

    def serving(self, **settings: Any) -> Any:
        return running(self.args.server, self.settings | settings, self.log)

    def controlled(self) -> Server:
        """The server that keeps the target, one for all parts."""
        if self._controlled is None:
            server: Server = self.enter_context(self.serving(target=self.target))
            self._controlled = server
        return self._controlled

    def ask(self, server: Server, ratio: str | None) -> Any:
        sent = generator.bodies(self.truth.texts, None if ratio is None else int(ratio))
        return lambda requests: generator.send(server.url, requests, sent)

    def measure_capacity(self, server: Server) -> None:
        sent = generator.bodies(self.truth.texts, int(self.dense))
        self.capacity = generator.capacity(server.url, sent, 2.0 if self.args.quick else 10.0)


def arm(run: Run, server: Server, ratio: str | None, parts: list[trace.Phase]) -> Row:
    """One arm over the trace."""
    name = "controlled" if ratio is None else "dense" if ratio == run.dense else f"k={ratio}"
    replies = run.ask(server, ratio)(trace.poisson(parts, len(run.truth.texts)))
    made: Row = {"case": "trace", "arm": name}
    if reason := summary.wrong(replies, run.truth, ratio):
        return made | {"status": "failed", "reason": reason}
    if not run.target:
        calm = [reply for reply in replies if reply.request.phase == 0]
        run.target = ALLOWANCE * summary.quantiles(calm)["p99"]
    return made | summary.row(replies, run.truth, run.dense, parts, run.target)


def traces(run: Run, say: Any) -> list[Row]:
    """Fixed levels on one server, then the controller on another one with the target."""
    made = []
    run.target = run.args.target or 0.0
    with run.serving() as server:
        run.measure_capacity(server)
        parts = trace.phases(run.capacity, run.args.seconds, run.args.burst)
        for ratio in run.args.levels:
            made.append(arm(run, server, ratio, parts))
            say(made[-1])
            if ratio == run.dense:
                run.slowdown = server.health()["slowdown"]
                if not run.target:
                    return made  # dense failed: there is nothing to compare with
    made.append(arm(run, run.controlled(), None, parts))
    say(made[-1])
    return made


def prepared(run: Run) -> None:
    """Capacity and target, for the parts that come without the trace."""
    if run.capacity:
        return
    with run.serving() as server:
        run.measure_capacity(server)
        if run.args.target:
            run.target = run.args.target
            return
        calm = [trace.Phase("half", 1.0 if run.args.quick else 15.0, 0.5 * run.capacity)]
        replies = run.ask(server, run.dense)(trace.poisson(calm, len(run.truth.texts)))
        if reason := summary.wrong(replies, run.truth, run.dense):
            raise ValueError(reason)
        run.target = ALLOWANCE * summary.quantiles(replies)["p99"]
        run.slowdown = server.health()["slowdown"]


def all_bursts(run: Run, say: Any) -> list[Row]:
    made = []
    highest = 1.2 if run.args.quick else 2.4
    for ratio in (*run.args.levels, None):
        check = lambda replies, r=ratio: summary.wrong(replies, run.truth, r)  # noqa: E731
        ask = run.ask(run.controlled(), ratio)
        row = bursts.largest(ask, check, run.capacity, len(run.truth.texts), run.target, highest)
        name = "controlled" if ratio is None else f"k={ratio}"
        made.append({"case": "bursts", "arm": name, **row})
        say(made[-1])
    return made


def soaked(run: Run, say: Any) -> list[Row]:
    server = run.controlled()
    seconds = 2.0 if run.args.quick else run.args.soak
    rate = run.args.burst * run.capacity
    made = soak.soak(server, run.ask(server, None), run.truth, run.dense, rate, seconds)
    say(made)
    return [made]


def simulated(run: Run, say: Any) -> list[Row]:
    world = simulation.World(
        run.times, run.slowdown, run.truth.tokens, run.target, run.batch_tokens
    )
    sizes, seconds = ((1, 2), 2.0) if run.args.quick else ((1, 4, 16, 64), 10.0)
    return simulation.rows(world, run.capacity, sizes, seconds)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    with options.refusals(made):
        options.check("parts", args.parts, PARTS)
    args.seconds = 1.0 if args.quick else args.seconds
    folder = results.folder(args.output, args.publish)
    names = ("server", "levels", "seconds", "burst", "soak", "threads", "quick", "parts")
    settings = options.chosen(args, *names)
    console = options.screen()
    content = results.result("dynamic_load", settings, {"name": "minilm-sst2"})

    def say(row: Row) -> None:
        console.print(table.line(row), highlight=False)
        sys.stdout.flush()

    with options.refusals(made, RuntimeError):
        with Run(args, folder / "dynamic_load_server.log") as run:
            if "trace" in args.parts:
                content["rows"] += traces(run, say)
            if set(args.parts) - {"trace"} and not any(
                r["status"] == "failed" for r in content["rows"]
            ):
                prepared(run)
                for part, work in (
                    ("simulation", simulated), ("bursts", all_bursts), ("soak", soaked)
                ):  # fmt: skip
                    if part in args.parts:
                        content["rows"] += work(run, say)
    content |= {"capacity": run.capacity, "target": run.target, "slowdown": run.slowdown}
    content |= {"times": vars(run.times)}
    own = [part for part in args.parts if part in ("bursts", "soak") and "trace" not in args.parts]
    path = folder / "_".join(("dynamic_load", *own))
    draw = figure.draw if "trace" in args.parts else None
    tables = table.tables_of(content)
    return options.finish(content, path.with_suffix(".json"), console, *tables, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
