"""Loss and perplexity of a model at a share of its parameters: by hard pruning and by the closed
form, untrained and after an equal budget of tokens with plain and with projected training.

``tiny`` is a byte-level LLaMA that is trained here first (minutes, kept in build/); ``smollm2`` is
SmolLM2-135M (``bench.tools.smollm2``), whose starts are measured untrained. A merged model must say
what the composed one says, or its row has no number and the exit code is 1.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch

import variator_kernels as vk

from .. import internals, plot
from ..decoder import setup
from ..harness import allocator, machine, options, results, tables
from ..harness.results import Row
from . import data, training
from .data import Text

STARTS: dict[str, dict[str, Any]] = {
    "select": {"start": "select", "split": "search"},
    "select, alike": {"start": "select", "split": "alike"},
    "select, weight": {"start": "select", "split": "alike", "importance": "weight"},
    "pca": {"start": "pca", "split": "search"},
    "pca, alike": {"start": "pca", "split": "alike"},
    "pca, gated": {"start": "pca", "split": "search", "importance": "gated"},
}
"""By the words of the table; with sizes of one's own nothing is split."""
TRAINED = ("select", "pca")
PLAIN, PROJECTED = "plain", "projected"
UNTRAINED = "none"
KEY = ("share", "start", "hidden", "ffn", "untied", "training", "tokens", "seed", "bf16")
"""What makes a row another one."""
SAME = 1e-3
"""How far apart the original's losses may lie on two machines, in nats."""
TOLERANCE = 1e-3
"""Of logits, as a part of their largest: a merged model's against the composed one's, in fp32."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("projected", __doc__)
    add = made.add_argument
    add("--model", default="tiny", help="tiny, smollm2, or a folder of a decoder; default tiny")
    add("--shares", help="shares of the parameters; default 0.33 (tiny), or 0.75,0.5")
    add("--sizes", type=sizes, nargs="+", metavar="HIDDEN:FFN", help="in place of shares")
    add("--starts", nargs="+", metavar="NAME", help=f"some of {', '.join(map(repr, STARTS))}")
    add("--trainings", type=options.words, default=[PLAIN, PROJECTED], help="default both")
    add("--add", type=Path, nargs="+", default=[], metavar="FILE",
        help="earlier results of this model, whose rows stay unless made again")  # fmt: skip
    add("--tokens", help="to train on, 0 for none; default 205000 (tiny), or 0")
    add("--seeds", type=options.count, default=3, help="of the training's rows; default 3")
    add("--rate", type=float, default=2e-3, help="of plain training and of A; P has a 30th")
    add("--teacher", action="store_true", help="train with half the original's divergence")
    add("--bf16", action="store_true", help="train under autocast, parameters in fp32")
    add("--steps", type=options.count, default=1500, help="of tiny from scratch; default 1500")
    add("--length", type=options.count, help="tokens a row; default 256 (tiny), or 512")
    add("--calibrate", type=options.count, help="rows the starts see; default 128, or 32")
    add("--rows", type=options.count, help="rows the loss is of; default 256, or 32")
    add("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    return made


def sizes(text: str) -> internals.Sizes:
    """``hidden:ffn``."""
    hidden, _, ffn = text.partition(":")
    return internals.Sizes(int(hidden), int(ffn))


def original(args: argparse.Namespace) -> tuple[Any, Text]:
    """The model and its text."""
    if args.model == "tiny":
        text = data.read(args.data, None, args.length)
        return training.tiny(text, args.steps), text
    found = setup.whole(args.model)
    return setup.load(found, torch.float32), data.read(args.data, found.tokenizer, args.length)


def agrees(small: Any, merged: Any, ids: torch.Tensor) -> str:
    """Why the numbers of ``merged`` are not those of ``small``, or nothing."""
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (merged, small))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return "" if error <= TOLERANCE else f"merged logits are off by {error:.2g}"


def row_of(base: Row, small: Any, held_out: torch.Tensor, dense: float) -> Row:
    """A measured row of a composed or plain model."""
    merged = vk.merge(small) if internals.is_projected(small) else small
    wrong = agrees(small, merged, held_out[:1])
    if wrong:
        return {**base, "status": "failed", "reason": wrong}
    loss = data.loss(merged, held_out)
    parameters = sum(p.numel() for p in merged.parameters())
    found = {"loss": loss, "excess": loss - dense, "parameters": parameters}
    return {**base, "status": "ok", **found}


def trained(small: Any, how: str, args: argparse.Namespace, text: Text, teacher: Any,
            tokens: int, seed: int) -> Any:  # fmt: skip
    """After ``tokens`` of training, the plain small model or the composed one."""
    if how == PLAIN:
        small = vk.merge(small)
        groups = [{"params": list(small.parameters()), "lr": args.rate}]
    else:
        groups = internals.parameter_groups(small, args.rate)
    steps = max(1, tokens // (training.ROWS * text.length))
    teacher = teacher if args.teacher else None
    training.fit(small, groups, text, steps, seed, teacher=teacher, bf16=args.bf16)
    return small


def measure(args: argparse.Namespace, content: Row, path: Path, say: Any) -> None:
    """The original, and every row; the result file is written after each."""
    model, text = original(args)
    held_out = text.held_out(args.rows)
    dense = data.loss(model, held_out)
    size = sum(p.numel() for p in model.parameters())
    say(f"original: {dense:.4f} nats, {size:,} parameters")
    content["model"] |= {"loss": dense, "parameters": size}
    ids = text.rows(args.calibrate, torch.Generator().manual_seed(1))
    batches = [{"input_ids": some} for some in ids.split(data.BATCH)]
    rows = content["rows"]
    earlier = added(args.add, content)

    def add(base: Row, small: Any) -> None:
        rows.append(row_of(base, small, held_out, dense))
        last = rows[-1]
        number = f"{last['loss']:.4f} nats" if last["status"] == "ok" else last["reason"]
        say(", ".join(f"{key} {last[key]}" for key in KEY), "-", number)
        results.write(path, content | {"rows": joined(earlier, rows)})

    for wanted in args.sizes or args.shares:
        for name in args.starts:
            begun = time.perf_counter()
            start = started(model, batches, wanted, name)
            made = start.variator_projection
            share = round(made.share, 3) if args.sizes else wanted
            base = {"model": options.named(args.model), "share": share, "start": name}
            base |= {"hidden": made.sizes.hidden, "ffn": made.sizes.ffn, "untied": made.untied}
            base |= {"training": UNTRAINED, "tokens": 0, "seed": None, "bf16": False}
            add(base | {"seconds": time.perf_counter() - begun}, start)
            for tokens in args.tokens if name in TRAINED else ():
                for seed in range(args.seeds):
                    for kind in args.trainings:
                        base |= {"training": kind, "tokens": tokens, "seed": seed}
                        base["bf16"] = args.bf16
                        begun = time.perf_counter()
                        small = trained(copy.deepcopy(start), kind, args, text, model, tokens, seed)
                        add(base | {"seconds": time.perf_counter() - begun}, small)
    content["rows"] = joined(earlier, rows)


def started(model: Any, batches: list[Any], wanted: Any, name: str) -> Any:
    """A start by its name, at a share of the parameters or at sizes."""
    how = dict(STARTS[name])
    if isinstance(wanted, internals.Sizes):
        del how["split"]
        return vk.project(model, batches, **wanted._asdict(), **how)
    return vk.project(model, batches, wanted, **how)


def added(files: list[Path], content: Row) -> list[Row]:
    """The rows of earlier runs; ``ValueError`` where the original was another."""
    found = []
    for file in files:
        earlier, here = results.read(file), content["model"]
        there = earlier["model"]
        same = all(there.get(name) == here[name] for name in ("name", "parameters"))
        if not same or abs(there["loss"] - here["loss"]) > SAME:
            raise ValueError(f"add must hold results of {here}, {file} is of {there}")
        if not all({*KEY} <= row.keys() and row["start"] in STARTS for row in earlier["rows"]):
            raise ValueError(f"add must hold results of this version, {file} has older rows")
        found += [row | {"share": round(row["share"], 3)} for row in earlier["rows"]]
    return found


def joined(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """All rows, the later of two of one key, in the order of starts."""
    found = {tuple(row[key] for key in KEY): row for row in (*earlier, *rows)}
    places = {name: place for place, name in enumerate(STARTS)}
    return sorted(found.values(), key=lambda row: (-row["share"], places[row["start"]]))


COLUMNS = [
    tables.key("share", "share"),
    tables.key("start", "start"),
    tables.key("training", "training"),
    tables.key("tokens", "tokens"),
    tables.key("seed", "seed"),
    tables.key("hidden", "hidden"),
    tables.key("FFN", "ffn"),
    tables.number("nats", lambda row: row["loss"], ".4f"),
    tables.number("over the original", lambda row: row["excess"], "+.4f"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    memory = allocator.keep_freed_memory()
    defaults = {"shares": "0.75,0.5", "tokens": "0", "length": 512, "calibrate": 32, "rows": 32}
    if args.model == "tiny":
        defaults = {"shares": "0.33", "tokens": "205000", "length": 256, "calibrate": 128}
        defaults["rows"] = 256
    options.settle(args, defaults)
    args.shares = [float(word) for word in options.words(args.shares)]
    args.tokens = [int(word) for word in options.words(args.tokens) if int(word)]
    args.starts = args.starts or list(STARTS)
    options.set_threads(args)
    console = options.screen()
    settings = options.settings(args, "data", "model", "add") | {"allocator": memory}
    name = options.named(args.model)
    content = results.result("projected", settings, {"name": name})
    path = options.path_of(args, f"projected_{name}")
    with options.refusals(made):
        options.check("starts", args.starts, list(STARTS), "some of")
        options.check("trainings", args.trainings, [PLAIN, PROJECTED], "some of")
        measure(args, content, path, lambda *words: console.print(*words, highlight=False))
    title = f"Projected Compression of {name}; the original: {content['model']['loss']:.4f} nats"
    table = tables.screen(title, COLUMNS, content["rows"])
    return options.finish(content, path, console, table, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
