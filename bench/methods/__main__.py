"""All methods on one model and task: the table of the Variator paper (its table 1), measured.

Compression plugins, Projected Compression, int8 and their combinations beside token pruning,
token merging, layer dropping, a distilled student and hard pruning: each trained with the same
rows, steps and loss, from the same original, then timed in one process on the same sentences. A
method that fails its check has no numbers, and the exit code is 1. Every trained method is kept in
a folder (--work): a run that was killed goes on where it was.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, set_seed

from .. import plot, quality_vs_k
from ..decoder import setup
from ..harness import allocator, machine, options, results, tables
from ..harness.results import Row
from ..quality import originals, stages
from ..quality import tasks as known
from . import figure, measuring, registry, training
from .registry import Method
from .tasks import Classification, Language, Task

TEXT = "wikitext2"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("methods", __doc__)
    add = made.add_argument
    tasks = (*known.TASKS, TEXT)
    add("--task", choices=tasks, default="sst2", help="default sst2; wikitext2: a decoder's text")
    add("--model", help="minilm (default), smollm2 (default of wikitext2), or a folder")
    add("--original", type=Path, help="folder of the model fine-tuned on the task; default: made")
    add("--methods", nargs="+", metavar="NAME", help="some of them, see --list; default all")
    add("--list", action="store_true", help="print the names of methods and settings")
    add("--seeds", type=options.count, default=3, help="default 3")
    add("--steps", type=int, help="of training, 0 for none; default 1500 (wikitext2: 0)")
    add("--batch", type=options.count, help="rows a step; default 16 (wikitext2: 2)")
    add("--calibrate", type=options.count, help="rows that starts see; default 600, or 32")
    add("--length", type=options.count, default=512, help="tokens a row of wikitext2; default 512")
    add(
        "--rows",
        type=options.count,
        help="rows of the dev set that are timed, 256; of text: scored, 32",
    )
    add("--rounds", type=options.count, default=7, help="of the timing; default 7")
    add("--data", type=Path, default=machine.DATA, help="folder with sst2/, rte/, wikitext2/")
    add("--work", type=Path, help="where trained methods are kept; default build/methods/...")
    return made


def settle(args: argparse.Namespace) -> None:
    """Fill in what was not asked for; ``ValueError`` for what cannot be."""
    of_text = args.task == TEXT
    defaults = {"model": "smollm2", "steps": 0, "batch": 2, "calibrate": 32, "rows": 32}
    if not of_text:
        defaults = {"model": "minilm", "steps": 1500, "batch": 16, "calibrate": 600, "rows": 256}
    options.settle(args, defaults)
    if args.steps < 0:
        raise ValueError(f"steps must be >= 0, got {args.steps}")
    if of_text and args.original:
        raise ValueError("original must not be given for wikitext2: --model is the original")
    options.set_threads(args)
    name = Path(args.model).name
    args.work = args.work or machine.ROOT / "build" / "methods" / f"{name}-{args.task}"


def task_of(args: argparse.Namespace) -> Task:
    """The original, which is fine-tuned here if it is not given, and its data."""
    if args.task == TEXT:
        return Language(args.model, args.data, args.length, args.calibrate, args.rows)
    task = known.TASKS[args.task]
    known.check(args.data, task)
    folder = args.original
    if folder is None:
        base = quality_vs_k.base(args.model)
        folder = originals.original(base, task, args.data, args.work)[0]
    return Classification(folder, args.task, args.data, args.calibrate, args.rows)


def every(args: argparse.Namespace) -> list[Method]:
    """The methods for the model, which is not read for that."""
    if args.task == TEXT:
        return registry.decoders(setup.architecture(args.model).config.num_hidden_layers)
    folder = args.original or quality_vs_k.base(args.model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return registry.encoders(config.num_hidden_layers)


def folder_of(args: argparse.Namespace, method: Method, seed: int) -> Path:
    """Of a method's weights."""
    words = f"{method.takes or method.name} {method.setting}".strip().lower()
    return args.work / re.sub(r"[^a-z0-9=]+", "-", words).strip("-") / f"seed{seed}"


def made(args: argparse.Namespace, task: Task, method: Method, seed: int) -> Any:
    """The method's model, trained here once and kept."""
    model, parts = task.fresh(), len(method.stages)
    for place, stage in enumerate(method.stages):
        set_seed(seed)
        folder = folder_of(args, method, seed) / f"stage{place}"
        model = stage.build(model, task)
        if not (folder / training.WEIGHTS).is_file():
            stage.start(model, task)
        steps = args.steps * (place + 1) // parts - args.steps * place // parts
        training.fit(
            model, folder, task, stage.weights or task.weights, seed, max_steps=steps,
            learning_rate=stage.rate, per_device_train_batch_size=args.batch,
        )  # fmt: skip
    return model.eval()


def answers(args: argparse.Namespace, task: Task, method: Method, seed: int) -> Row:
    """The scores of a method, served, on the held-out splits; made once."""
    folder = folder_of(args, method, seed)
    path = folder / ("answers-int8.json" if method.precision else "answers.json")
    if not path.is_file():
        model = registry.served(method, made(args, task, method, seed))
        folder.mkdir(parents=True, exist_ok=True)
        results.write(path, {"scores": task.evaluate(model)})
    row = {"method": method.name, "setting": method.setting, "seed": seed}
    return row | json.loads(path.read_text())


def run(args: argparse.Namespace, task: Task, methods: list[Method], content: Row,
        path: Path, say: Any) -> None:  # fmt: skip
    """Train, answer, measure; the result file is written after each."""
    for method in methods:
        for seed in range(args.seeds if method.stages and args.steps else 1):
            row = answers(args, task, method, seed)
            content["rows"].append(row)
            words = ", ".join(f"{split} {value:.4g}" for split, value in row["scores"].items())
            say(f"{method.label}, seed {seed}: {words}")
            results.write(path, content)
    content["costs"] = measuring.costs(
        methods, task, lambda method: made(args, task, method, 0), args.rounds, say
    )
    content["summary"] = figure.summary(content)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON, Markdown and PNG; 1 if a check failed."""
    command = parser()
    memory = allocator.keep_freed_memory()
    args = command.parse_args(arguments)
    options.quiet()
    console = options.screen()
    with options.refusals(command):
        settle(args)
        methods = registry.chosen(every(args), args.methods)
        if args.list:
            console.print("\n".join(method.label for method in methods), highlight=False)
            return 0
        settings = options.settings(args, "data", "work", "list", "model", "original")
        fixed = options.chosen(args, "task", "steps", "batch", "calibrate", "length", "model")
        fixed |= {"data": args.data.name, "original": str(args.original)}
        fixed |= {"decay": 0.0, "rates": registry.RATES}
        stages.claim(args.work, fixed)
        task = task_of(args)
    name = options.named(args.model)
    content = results.result("methods", settings | {"allocator": memory}, {"name": name})
    content |= {"task": args.task, "score": task.score}
    path = options.path_of(args, f"methods_{name}_{args.task}")
    run(args, task, methods, content, path, lambda text: console.print(text, highlight=False))
    shown = figure.columns(task.score)
    good = results.pick(content["summary"], status="ok")
    path.with_suffix(".md").write_text(tables.markdown(shown, good) + "\n")
    table = tables.screen(f"{name}, {args.task}", shown, content["summary"])
    options.finish(content, path, console, table, draw=plot.draw)
    return int(any(row["status"] != "ok" for row in content["costs"]))


if __name__ == "__main__":
    sys.exit(main())
