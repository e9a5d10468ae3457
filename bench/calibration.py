"""What ``vk.calibrate`` is worth on text that it did not see, its time and its memory.

The error is the relative squared error of the last hidden state, of paragraphs of articles that no
plugin was fitted to: with every site compressed, and with each site alone, before and after. A case
is a number of paragraphs to calibrate on and the tokens that stay whole; each runs in a process of
its own, whose growth is the memory. The check: at ratio 1 the patched model gives the dense one's
states bit for bit, and no ratio ends worse on the sequences that ``calibrate`` itself held out.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoTokenizer

import variator_kernels as vk

from . import internals
from .cases import models
from .harness import allocations, child, machine, options, results, tables
from .harness.results import Row
from .quality import text
from .quality.errors import Batches, error, states

FIRST = "first"
KEPT = ("none", FIRST, "first, separator", "first, largest")
"""Tokens that stay whole; "largest": ids whose FFN outputs are far above the others'."""
IDS, RARE = 8, 20
"""So many ids at most, each seen so often at least; an output so many times the median's counts as
large."""
LARGE = 3.0
TARGETS = {64: {2: 0.45, 4: 0.60}, 500: {2: 0.33, 4: 0.46}}
"""Of MiniLM as it ships, first token kept: the error at most from up to so many paragraphs."""
in_child = partial(child.measured, "calibration")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("calibration", __doc__)
    add = made.add_argument
    add("--model", default="minilm", help="minilm (default), or a folder with a tokenizer")
    add("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    add("--paragraphs", type=_counts, default=[64, 320], help="default 64,320")
    add("--kept", type=_kept, default=list(KEPT),
        help=f"at the fewest paragraphs: some of {'; '.join(KEPT)}; default all")  # fmt: skip
    add("--ratios", type=options.ratios, default=[2, 4], help="default 2,4")
    add("--unseen", type=options.count, default=64, help="paragraphs to measure; default 64")
    add("--length", type=options.count, default=256, help="tokens a row at most; default 256")
    add("--batch", type=options.count, default=16, help="rows a batch; default 16")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    return made


def _counts(text: str) -> list[int]:
    return sorted({options.count(word) for word in options.words(text)})


def _kept(text: str) -> list[str]:
    return [word.strip() for word in text.split(";")]


def cells(args: argparse.Namespace) -> list[Row]:
    """Every number of paragraphs with the first token kept, the fewest with each choice, and these
    once more with a second pass over the sites."""
    names = ("model", "ratios", "unseen", "length", "batch", "threads")
    shared = {**options.chosen(args, *names), "data": str(args.data)}
    few = args.paragraphs[0]
    made = [(few, kept, False) for kept in args.kept]
    made += [(many, FIRST, False) for many in args.paragraphs[1:]]
    made += [(few, FIRST, True)]
    return [dict(zip(("paragraphs", "kept", "again"), of, strict=True)) | shared for of in made]


@torch.no_grad()
def measure(cell: Row) -> Row:
    """A case: rows of errors, seconds, and the bytes by which this process grew."""
    torch.set_num_threads(cell["threads"])
    architecture = models.architecture(cell["model"])
    words: Any = AutoTokenizer.from_pretrained(
        architecture.tokenizer or models.minilm(), local_files_only=True
    )
    data, count = Path(cell["data"]), cell["paragraphs"]
    long = [line for line in text.training(data) if len(line.split()) >= text.LEAST_WORDS]
    if len(long) < count:
        raise ValueError(f"paragraphs must be at most {len(long)}, got {count}")
    # In their order: of the runs that are held out, most articles are in no other.
    chosen = [long[i * len(long) // count] for i in range(count)]
    parts = chosen, text.held_out(data)[: cell["unseen"]]
    seen, unseen = (
        text.tokenized(part, words, cell["length"], cell["batch"], return_token_type_ids=False)
        for part in parts
    )
    model = models.encoder(architecture, torch.float32)
    ids = _ids(model, seen, words, cell["kept"])
    exact = [states(model, batch) for batch in unseen]
    vk.patch(model, 1, cell["ratios"], keep_first=int(cell["kept"] != "none"), keep=ids or None)
    same = all(torch.equal(states(model, b), e) for b, e in zip(unseen, exact, strict=True))
    levels: list[tuple[int, int | None, Any]] = []
    for k in cell["ratios"]:
        levels.append((k, None, internals.state(model).everywhere(k)))
        levels += [(k, layer, one) for layer, one in enumerate(internals.singly(model, k))]
    before = [error(model, unseen, exact, level) for _, _, level in levels]
    found: list[Any] = []

    def work() -> None:
        began = time.perf_counter()
        found.append(vk.calibrate(model, seen))
        found.append(time.perf_counter() - began)
        if cell["again"]:
            for k in cell["ratios"]:
                vk.calibrate(model, seen, [internals.state(model).everywhere(k)])

    grown = allocations.grown(work)
    after = [error(model, unseen, exact, level) for _, _, level in levels]
    own = {(row.ratio, row.layer): row for row in found[0].rows}
    whole = (row for row in found[0].rows if row.layer is None)
    harmless = all(row.after <= row.before * (1 + 1e-9) for row in whole)
    rows = [
        {"k": k, "layer": layer, "before": b, "after": a, "held_out": own[k, layer].after}
        for (k, layer, _), b, a in zip(levels, before, after, strict=True)
    ]
    left = {str(k): _left(model, unseen, ids, k) for k in cell["ratios"]}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in seen)
    status = {"status": "ok" if same and harmless else "failed", "reason": ""}
    if status["status"] != "ok":
        status["reason"] = "ratio 1 is not the dense model" if not same else "a ratio ends worse"
    return {**status, "errors": rows, "tokens": tokens, "seconds": found[1], "bytes": grown,
            "ids": ids, "multiply_adds_left": left}  # fmt: skip


def _left(model: nn.Module, batches: Batches, ids: list[int], k: int) -> float:
    used = dense = 0.0
    for batch in batches:
        kept = torch.isin(batch["input_ids"], torch.tensor(ids or [-1]))
        lengths = batch["attention_mask"].sum(1).tolist()
        found = vk.flops.count(model, length=lengths, ratio=k, kept=kept)
        used += found.multiply_adds.total
        dense += found.dense_multiply_adds.total
    return used / dense


def _ids(model: Any, batches: Batches, words: Any, kept: str) -> list[int]:
    """Those that stay whole besides the first token."""
    if kept == "first, separator":
        return [words.sep_token_id]
    return largest(model, batches) if kept == "first, largest" else []


def largest(model: Any, batches: Batches) -> list[int]:
    """The ids whose FFN outputs are longest, by their mean over layers in medians of all tokens;
    the first token of a row, which stays whole anyway, is not looked at."""
    seen: list[list[Tensor]] = []
    hooks = [module.register_forward_hook(lambda m, a, out: seen[-1].append(out.norm(dim=-1)))
             for module in internals.ffn_outputs(model)]  # fmt: skip
    total = torch.zeros(model.config.vocab_size, 2, dtype=torch.float64)
    for batch in batches:
        seen.append([])
        model(**batch)
        real = batch["attention_mask"].bool()
        real[:, 0] = False
        norms = [each[real] for each in seen.pop()]
        size = torch.stack([each / each.median() for each in norms]).mean(0)
        add = torch.stack([size, torch.ones_like(size)], -1).double()
        total.index_add_(0, batch["input_ids"][real], add)
    for hook in hooks:
        hook.remove()
    mean = torch.where(total[:, 1] >= RARE, total[:, 0] / total[:, 1].clamp_min(1), 0.0)
    values, places = mean.topk(IDS)
    return sorted(int(place) for place in places[values >= LARGE])


def lines(rows: list[Row], name: str) -> list[Row]:
    """A line a case and ratio, of a model of this name."""
    made = []
    for row in results.pick(rows, status="ok"):
        for whole in (each for each in row["errors"] if each["layer"] is None):
            k, alone = whole["k"], [e for e in row["errors"] if e["layer"] is not None]
            of = [each["after"] / each["before"] for each in [whole, *alone] if each["k"] == k]
            limit = None
            if name == "minilm" and row["kept"] == FIRST and not row["again"]:
                most = next((n for n in TARGETS if row["paragraphs"] <= n), max(TARGETS))
                limit = TARGETS[most].get(k)
            share = row["multiply_adds_left"][str(k)]
            made.append({**row, **whole, "worst": max(of), "limit": limit, "left": share})
    return made


def _whole(row: Row) -> str:
    if row["kept"] != "first, largest":
        return str(row["kept"])
    return f"first, {len(row['ids'])} ids with large outputs"


def _after(row: Row) -> str:
    limit = "" if row["limit"] is None else f" (target {row['limit']})"
    return f"{row['after']:.3f}{limit}"


COLUMNS = [
    tables.Column("paragraphs, tokens", lambda row: f"{row['paragraphs']}, {row['tokens']}"),
    tables.Column("kept whole", _whole),
    tables.Column("passes over the sites", lambda row: "2" if row["again"] else "1"),
    tables.key("k", "k"),
    tables.number("multiply-adds left", lambda row: row["left"], ".1%"),
    tables.number("error untrained", lambda row: row["before"], ".3f"),
    tables.Column("calibrated", _after),
    tables.number("worst of a site or all, of untrained", lambda row: row["worst"]),
    tables.number("seconds", lambda row: None if row["again"] else row["seconds"], ".0f"),
    tables.number("growth, MiB", lambda row: row["bytes"] and row["bytes"] / 2**20, ".0f"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    if args.cell:
        print(json.dumps(measure(args.cell)))
        return 0
    options.set_threads(args)
    with options.refusals(made):
        options.check("kept", args.kept, KEPT)
        model = models.architecture(args.model)
        if not (args.data / "wikitext2").is_dir():
            raise FileNotFoundError(f"data must hold wikitext2/, got {args.data}")
    content, console = options.begin("calibration", options.settings(args, "data", "model"), model)
    path = options.path_of(args, f"calibration_{content['model']['name']}")
    for cell in track(cells(args), "calibrating", console=console):
        kept = {name: cell[name] for name in ("paragraphs", "kept", "again")}
        content["rows"].append({**kept, **in_child(cell)})
        results.write(path, content)
    shown = lines(content["rows"], content["model"]["name"])
    return options.finish(content, path, console, tables.screen("calibration", COLUMNS, shown))


if __name__ == "__main__":
    sys.exit(main())
