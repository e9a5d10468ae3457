"""Prefill and decoding of smaller models over the original's, beside what multiply-adds promise.

Original and merged models run as Hugging Face does, in turns, in one process. A merged model must
say what the composed one says, or its row has no number and the exit code is 1. Speed does not
depend on values: the start is ``"select"`` by weights, which needs no text.
"""

import argparse
import copy
import sys
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import variator_kernels as vk

from ..cases import models
from ..decoder import setup
from ..decoder.levels import Level
from ..decoder.timing import Run
from ..harness import options, results, tables
from ..harness.clock import Wall, quartiles, ratio
from ..harness.results import Row
from . import __main__ as whole

PASSES = {"first": "prefill", "next": "decoding"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("projected.speed", __doc__)
    add = made.add_argument
    add("--model", default="smollm2", help="smollm2 (default), or a folder of a decoder")
    add("--shares", type=options.words, default=["0.75", "0.5"], help="default 0.75,0.5")
    add("--dtype", type=options.words, help="default fp32, and bf16 if the processor has it")
    add("--length", type=options.count, default=512, help="tokens of the prompt; default 512")
    add("--tokens", type=options.count, default=32, help="decoded behind it; default 32")
    add("--rounds", type=options.count, default=7, help="default 7")
    return made


def shares(words: list[str]) -> list[float]:
    """``ValueError`` unless each lies in (0, 1), once."""
    found = [float(word) for word in words]
    if not all(0 < share < 1 for share in found) or len({*found}) < len(found):
        raise ValueError(f"shares must be different numbers in (0, 1), got {','.join(words)}")
    return found


def multiply_adds(run: Run, prompt: Any) -> dict[str, float]:
    """Of the prompt, and of the next token: products of weights and causal attention, which
    PyTorch's counter does not see on a CPU."""
    config = run.model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = prompt.shape[1]
    attention = {"first": length * (length + 1) / 2, "next": length + 1}
    found = {}
    token, cache = None, None
    for name, seen in attention.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if name == "first":
                token, cache = run.first(prompt)
            else:
                run.model(input_ids=token, past_key_values=cache, use_cache=True)
        found[name] = counter.get_total_flops() / 2 + 2 * layers * heads * size * seen
    return found


def merged(model: Any, share: float) -> tuple[Any, Row]:
    """The plain, smaller model, and what a row says of it."""
    small: Any = vk.project(model, params=share, start="select", importance="weight")
    sizes, plain = small.variator_projection.sizes, vk.merge(small)
    wrong = whole.agrees(small, plain, models.tokens(1, 64, model.config.vocab_size))
    status = {"status": "failed", "reason": wrong} if wrong else {"status": "ok"}
    return plain, {"arm": "merged", "hidden": sizes.hidden, "ffn": sizes.ffn, **status}


def measure(args: argparse.Namespace) -> list[Row]:
    """A row a dtype, for the original and for each share."""
    found = setup.whole(args.model)
    fp32 = setup.load(found, torch.float32)
    rows: list[Row] = []
    smaller = [merged(fp32, share) for share in args.shares]
    prompt = models.tokens(1, args.length, found.config.vocab_size)
    for dtype in args.dtype:
        base = {"model": options.named(args.model), "dtype": dtype, "prompt": args.length}
        arms = [(1.0, fp32, {"arm": "original", "status": "ok"})]
        arms += [(s, m, about) for s, (m, about) in zip(args.shares, smaller, strict=True)]
        runs, taken = {}, {}
        for share, model, about in arms:
            cast = models.cast(copy.deepcopy(model), models.DTYPES[dtype])
            parameters = sum(p.numel() for p in model.parameters())
            taken[share] = {**base, "share": share, "parameters": parameters, **about}
            if about["status"] == "ok":
                runs[share] = Run(cast.eval(), Level(), args.tokens)
        _timed(runs, taken, prompt, args)
        rows += taken.values()
    return rows


def _timed(runs: dict[float, Run], rows: dict[float, Row], prompt: Any, args: Any) -> None:
    """Both passes of every arm, and of what was promised how much came."""
    counts = {}
    for share, run in runs.items():
        counts[share] = multiply_adds(run, prompt)
        run.prefilled = run.first(prompt)
    calls: dict[str, dict[float, Any]] = {
        "first": {share: partial(run.first, prompt) for share, run in runs.items()},
        "next": {share: partial(run.continuation, 1) for share, run in runs.items()},
    }
    for name, some in calls.items():

        def before(share: float, name: str = name) -> None:
            if name == "next":
                runs[share].copied(1)

        seconds, _ = Wall().interleave(some, args.rounds, before=before)
        each = args.tokens if name == "next" else 1
        for share in runs:
            over = ratio(seconds[1.0], seconds[share])
            promised = counts[1.0][name] / counts[share][name]
            rows[share][name] = {
                **quartiles([s / each for s in seconds[share]]), "speedup": over,
                "promised": promised, "kept": over["median"] / promised,
            }  # fmt: skip


def _columns(name: str, title: str) -> list[tables.Column]:
    """Of a pass."""
    return [
        tables.number(f"{title}, ms", lambda row: 1e3 * row[name]["median"], ".1f"),
        tables.number("over the original", lambda row: row[name]["speedup"]["median"]),
        tables.number("promised", lambda row: row[name]["promised"]),
        tables.number("of the promised", lambda row: row[name]["kept"], ".0%"),
    ]


COLUMNS = [
    tables.Column("share", lambda row: f"{row['share']:.0%}", True),
    tables.key("dtype", "dtype"),
    tables.number("parameters, million", lambda row: row["parameters"] / 1e6, ".1f"),
    tables.Column("hidden", lambda row: str(row.get("hidden", ""))),
    tables.Column("FFN", lambda row: str(row.get("ffn", ""))),
    *(column for name, title in PASSES.items() for column in _columns(name, title)),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    options.quiet()
    name = options.named(args.model)
    with options.refusals(made):
        options.settle_dtypes(args)
        args.shares = shares(args.shares)
        content = results.result("projected_speed", options.settings(args, "model"), {"name": name})
        content["rows"] = measure(args)
    table = tables.screen(f"{name}, smaller", COLUMNS, content["rows"])
    path = options.path_of(args, f"projected_speed_{name}")
    return options.finish(content, path, options.screen(), table)


if __name__ == "__main__":
    sys.exit(main())
