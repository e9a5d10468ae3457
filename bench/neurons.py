"""Active FFN neurons against k: how many a merged vector switches on, and which.

Share of active neurons, and overlap of a merged vector's with the intersection and the union of
its tokens' (the paper's figure 5 and table 5; ``variator_kernels.analysis`` has the definitions).
The counter is first compared with hooks in the model's own modules, the kernels' merge with plain
PyTorch's, and merged vectors must lie between intersection and union; a model that fails has no
numbers, and the exit code is 1.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

import variator_kernels as vk
from variator_kernels.analysis import Activity, neurons

from . import internals, plot
from .cases import models
from .harness import machine, options, results, tables
from .harness.results import Row
from .quality import text

RATIOS = (2, 4, 8, 16, 32)
Batch = dict[str, Tensor]
TOLERANCE = 1e-3
"""Of the counts: a neuron whose input is nearly at the threshold may fall on either side of it when
products add up in another order."""


def paragraphs(path: Path, count: int, least: int = 400) -> list[str]:
    """The first paragraphs (lines that are no heading) of at least ``least`` characters.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it has fewer of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data must be a text file, there is no {path}")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if len(line) >= least and not line.startswith("=")][:count]
    if len(found) < count:
        raise ValueError(
            f"data must hold {count} paragraphs of {least} characters, {path} has {len(found)}"
        )
    return found


def tokenized(texts: list[str], tokenizer: Path, length: int, batch: int) -> list[Batch]:
    """``input_ids`` and ``attention_mask``, rows of at most ``length`` tokens, right-padded."""
    tokenize: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return text.tokenized(texts, tokenize, length, batch, return_token_type_ids=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = options.parser("neurons", __doc__)
    which = (
        f"some of {', '.join(models.NAMES)}, or folders with config.json and perhaps weights and a "
        "tokenizer; default minilm,t5-small"
    )
    made.add_argument("--model", type=options.words, default=["minilm", "t5-small"], help=which)
    made.add_argument("--plugins", type=Path, help="folder of trained plugins, beside untrained")
    made.add_argument("--ratios", type=options.ratios, help="default 2,4,8,16,32, or the plugins'")
    made.add_argument("--data", type=Path, default=machine.DATA / "wikitext2" / "test.txt")
    made.add_argument("--rows", type=options.count, default=64, help="paragraphs; default 64")
    made.add_argument("--least", type=options.count, default=400, help="characters of a paragraph")
    made.add_argument("--length", type=options.count, default=128, help="tokens a row; default 128")
    made.add_argument("--batch", type=options.count, default=16, help="rows a batch; default 16")
    made.add_argument("--threshold", type=float, default=0.0, help="of an active neuron; default 0")
    return made


def plugged(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """The model with untrained plugins, and with the trained ones if there are any."""
    made, ratios = {}, args.ratios or RATIOS
    if args.plugins:
        trained = copy.deepcopy(model)
        vk.load_plugins(trained, args.plugins)
        ratios = args.ratios or internals.state(trained).ratios
        made["trained"] = trained
    return {"untrained": vk.patch(copy.deepcopy(model), ratios=ratios), **made}


def check(model: nn.Module, batch: Batch, ratios: tuple[int, ...], threshold: float) -> str:
    """Why counts of this (unpatched) encoder cannot be trusted, or nothing."""
    layers, real = internals.ffn_sublayers(model), batch["attention_mask"].bool()
    hooked = [0] * len(layers)

    def hook(layer: int) -> Any:
        def count(module: nn.Module, inputs: tuple) -> None:
            hooked[layer] += int((inputs[0][real] > threshold).sum())

        return count

    acts = map(internals.activation_module, layers)
    handles = [act.register_forward_pre_hook(hook(i)) for i, act in enumerate(acts)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    ours, plain = (
        vk.patch(copy.deepcopy(model), ratios=ratios, backend=backend)
        for backend in ("auto", "reference")
    )
    dense = [activity.active for activity in neurons(ours, [batch], 1, threshold)]
    if not close(dense, hooked):
        return f"the dense model has {dense} active neurons, hooks count {hooked}"
    for k in ratios:
        counted = neurons(ours, [batch], k, threshold)
        got = [a.merged for a in counted]
        expected = [a.merged for a in neurons(plain, [batch], k, threshold)]
        if not close(got, expected):
            return f"k={k}: {got} active neurons, plain PyTorch has {expected}"
        between = [n for a in counted for n in (a.merged_in_intersection, a.merged_in_union)]
        if not close(between, [n for a in counted for n in (a.intersection, a.merged)]):
            return f"k={k}: merged vectors are not between intersection and union"
    return ""


def close(got: list[int], expected: list[int]) -> bool:
    """Equal within the tolerance."""
    return all(abs(a - b) <= TOLERANCE * max(b, 1) for a, b in zip(got, expected, strict=True))


def measure(name: str, args: argparse.Namespace, console: Console) -> list[Row]:
    """The rows of one model: by plugins, by ratio, each layer and then all together."""
    architecture = models.architecture(name)
    base = {"model": architecture.name, "weights": architecture.weights}
    model = models.encoder(architecture, torch.float32)
    texts = paragraphs(args.data, args.rows, args.least)
    tokenizer = architecture.tokenizer or models.minilm()
    batches = tokenized(texts, tokenizer, args.length, args.batch)
    kinds = plugged(model, args)
    ratios = internals.state(kinds["untrained"]).ratios
    wrong = check(model, batches[0], ratios, args.threshold)
    if wrong:
        return [{**base, "status": "failed", "reason": wrong}]
    rows: list[Row] = []
    with tables.progress(console) as bar:
        bar.start(architecture.name, len(batches) * len(kinds) * (1 + len(ratios)))

        def stepping() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                bar.step("")

        for kind, patched in kinds.items():
            for k in (1, *ratios):
                layers = neurons(patched, stepping(), k, args.threshold)
                every: list[tuple[Any, Activity]] = list(enumerate(layers))
                every.append(("all", sum(layers[1:], start=layers[0])))
                rows += [
                    {**base, "status": "ok", "plugins": kind, "k": k, "layer": layer}
                    | activity.shares()
                    | {"counts": vars(activity)}
                    for layer, activity in every
                ]
    return rows


SHARES = {
    "token": "of a token",
    "merged": "of a merged vector",
    "intersection": "of all tokens of a group",
    "union": "of any token of a group",
    "merged_in_intersection": "of the merged, in the intersection",
    "union_kept": "of the union, in the merged",
}
COLUMNS = [
    tables.key("model", "model"),
    tables.Column("plugins", lambda row: row["plugins"]),
    tables.Column("k", lambda row: str(row["k"])),
    *(
        tables.number(heading, lambda row, name=name: 100 * row[name], ".1f")  # type: ignore[misc]
        for name, heading in SHARES.items()
    ),
]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG; 1 if a check failed."""
    made = parser()
    args = made.parse_args(arguments)
    if args.plugins and len(args.model) > 1:
        made.error("--plugins belong to one --model")
    options.set_threads(args)
    console = options.screen()
    settings = options.settings(args, "model")
    settings |= {"data": args.data.name, "plugins": args.plugins and args.plugins.name}
    names = ", ".join(Path(name).name for name in args.model)
    content = results.result("neurons", settings, {"name": names})
    with options.refusals(made):
        for name in args.model:
            content["rows"] += measure(name, args, console)
    stem = f"neurons_{Path(args.model[0]).name}" if args.plugins else "neurons"
    shown = [r for r in content["rows"] if r["status"] == "failed" or r["layer"] == "all"]
    table = tables.screen("Active neurons, all layers, %", COLUMNS, shown)
    return options.finish(content, options.path_of(args, stem), console, table, draw=plot.draw)


if __name__ == "__main__":
    sys.exit(main())
