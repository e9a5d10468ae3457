"""Python overhead: of a patched FFN sublayer beyond its op, on a small input; and of a switch.

The FFN is small too (32 x 48), whatever the model: Python does not look at sizes, and a weight that
is streamed from memory would take a hundred times as long as what is measured.
The sublayer is called inside a forward of its encoder. The bare op,
``torch.ops.variator.compressed_ffn``, gets the arguments that the sublayer gave it. The two take
turns, and their outputs must be equal before and after; otherwise there is no number, and the exit
code is 1. Switches of levels are timed while another thread runs the model: ``switching.py``.

Last rows are what Python takes for the public op on a GPU: kernels of one sublayer with their
launches stubbed, on the CPU; Triton's, and CUDA's in the emulation that ``make emulation`` builds.
What a launch itself takes (Triton's binder, the driver, asking PyTorch for a stream) is not in it;
the check is that every call reaches the same launches: four of Triton's, or one of CUDA's.
"""

import argparse
import json
import os
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

import variator_kernels as vk

from . import internals, switching
from .cases import models
from .harness import child, machine, options, results, tables
from .harness.clock import Wall, quartiles
from .harness.results import Row

MODELS, TOKENS, RATIO, LIMIT = ("t5-base", "bert-base"), 8, 4, 40.0
PUBLIC_OP_LIMIT = 60.0
LAUNCHES = ["group_merge_kernel", "linear_kernel", "linear", "adapter_decompress_kernel"]
"""Of a sublayer; its second product is cuBLAS's."""
BURST = 5  # calls between two readings of the clock


@torch.no_grad()
def measure(name: str, rounds: int) -> Row:
    """One model: microseconds of the first FFN sublayer beyond its op."""
    model = switching.plugged(name, RATIO, (RATIO,), layers=2)
    layer = internals.ffn_sublayers(model)[0]
    sublayer = getattr(layer, "feed_forward_chunk", layer)
    ids = models.tokens(1, TOKENS, model.config.vocab_size)
    with switching.Operations() as seen:
        model(input_ids=ids)
    ours = (call for call in seen.found if call[0].name().startswith("variator::compressed_ffn"))
    op, args, more = next(ours)
    row: Row = {"case": "overhead", "model": name, "arm": "sublayer", "k": RATIO, "limit": LIMIT}

    def inside(module: nn.Module, inputs: Any, output: Any) -> None:
        """Runs where the encoder's forward has begun, as the sublayer does; once."""
        while handles:
            handles.pop().remove()
        calls = {"op": lambda: op(*args, **more), "sublayer": lambda: sublayer(args[0])}
        equal = [torch.equal(*(call() for call in calls.values())) for _ in range(20)]
        clock = Wall()
        clock.burst = BURST
        samples, last = clock.interleave(calls, rounds)
        if not (all(equal) and torch.equal(*last.values())):
            row.update(status="failed", reason="the outputs of sublayer and op differ")
            return
        pairs = zip(samples["sublayer"], samples["op"], strict=True)
        beyond = [1e6 * (whole - alone) for whole, alone in pairs]
        op_us = quartiles(samples["op"])["median"] * 1e6
        row.update(status="ok", samples=beyond, **quartiles(beyond), op=op_us)

    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    handles = [module.register_forward_hook(inside) for module in embeddings]
    model(input_ids=ids)
    return row


def _launches(backend: str) -> Row:
    return {"case": "launches", "model": "public op, stubbed launches", "arm": backend,
            "k": RATIO, "limit": PUBLIC_OP_LIMIT, "op": 0.0}  # fmt: skip


def _public_op(backend: str, rounds: int) -> list[float]:
    """Microseconds of each call."""
    architecture = models.toy(models.architecture("t5-base"))
    _, ffn = models.sublayer(architecture, torch.bfloat16)
    plugin = models.plugin(architecture.config, RATIO, 64, torch.bfloat16)
    x = models.hidden(1, TOKENS, architecture.config.hidden_size, torch.bfloat16)
    clock = Wall()
    clock.burst = BURST
    call = partial(vk.functional.compressed_ffn, x, plugin, ffn, backend=backend)
    return [1e6 * each for each in clock.interleave({"": call}, rounds)[0][""]]


@torch.no_grad()
def measure_launches(rounds: int) -> Row:
    """The public op on Triton, launches stubbed."""
    row = _launches("triton")
    try:
        from .tools.triton_compiler import stubbed
    except ImportError as error:
        return {**row, "status": "skipped", "reason": str(error)}
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {**row, "status": "skipped", "reason": "kernels are interpreted in this process"}
    with stubbed("sm_90") as launched:
        found = _public_op("triton", rounds)
    if launched != LAUNCHES * (len(found) * BURST):
        return {**row, "status": "failed", "reason": f"other launches: {launched[:4]}"}
    return {**row, "status": "ok", "samples": found, **quartiles(found)}


def measure_cuda(rounds: int) -> Row:
    """The same on CUDA, in a process of its own that loads the emulation."""
    built = sorted((machine.ROOT / "build" / "emulation").glob("_cuda*.so"))
    if not built:
        reason = "the emulation is not built: make emulation"
        return {**_launches("cuda"), "status": "skipped", "reason": reason}
    found = child.measured("overhead", {"rounds": rounds}, VARIATOR_CUDA_EXTENSION=str(built[0]))
    return {**_launches("cuda"), **found}


@torch.no_grad()
def emulated(cell: Row) -> Row:
    """What :func:`measure_cuda`'s process measures."""
    torch.set_num_threads(1)
    cuda = internals.emulation()
    cuda.stub_launches(True)
    before = cuda.launched()
    found = _public_op("cuda", cell["rounds"])
    calls = len(found) * BURST
    if (launches := cuda.launched() - before) != calls:
        return {"status": "failed", "reason": f"{launches} launches of {calls} calls"}
    return {"status": "ok", "samples": found, **quartiles(found)}


def _microseconds(name: str) -> tables.Column:
    return tables.number(f"{name}, µs", lambda row: row.get(name), ".1f")


COLUMNS = [
    tables.key("model", "model"), tables.key("what", "arm"),
    *map(_microseconds, ("op", "median", "q1", "q3")),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if a check failed."""
    made = options.parser("overhead", __doc__, threads=1)
    made.add_argument("--model", type=options.words, default=list(MODELS), help="default both")
    made.add_argument("--rounds", type=options.count, default=400, help="default 400")
    made.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = made.parse_args(arguments)
    if args.cell:
        print(json.dumps(emulated(args.cell)))
        return 0
    torch.set_num_threads(args.threads)
    settings = {"rounds": args.rounds, "threads": args.threads, "tokens": TOKENS}
    content = results.result("overhead", settings, {"name": ", ".join(args.model)})
    with options.refusals(made):
        content["rows"] = [measure(name, args.rounds) for name in args.model]
        for name in args.model:
            content["rows"] += switching.measure(name, args.rounds)
        content["rows"] += [measure_launches(args.rounds), measure_cuda(args.rounds)]
    title = f"a patched sublayer beyond its op, 1 x {TOKENS} tokens, k={RATIO}; a switch"
    table = tables.screen(title, COLUMNS, content["rows"], note=_note)
    return options.finish(content, options.path_of(args, "overhead"), options.screen(), table)


def _note(row: Row) -> str:
    return f"{'met' if row['median'] <= row['limit'] else 'missed'}: at most {row['limit']:g} µs"


if __name__ == "__main__":
    sys.exit(main())
