"""Each kernel alone, forward and backward, under every instruction set of this machine or on a GPU.

The arms of a kernel take turns. Each is checked against float64 before and after it is timed;
without a green check it has no number, and the exit code is 1.
"""

import itertools
import sys

import torch

from variator_kernels import backends, extension

from .cases import kernels, models
from .cases.sublayer import Sublayer
from .harness import options, results, tables
from .harness.clock import Eager, Graph, Wall
from .harness.runner import run


def arms(device: str) -> dict[str, str]:
    """What can run: instruction sets on the CPU, backends on a GPU."""
    if device == "cuda":
        usable = {status.name for status in backends.status() if status.usable}
        return {name: name for name in ("triton", "cuda") if name in usable}
    cpu = extension.load()
    return {name: name for name in cpu.available_isas()} if cpu else {}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON; 1 if an arm failed."""
    made = options.parser("kernels", __doc__)
    options.add_common(made)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--kernels", type=options.words, default=list(kernels.NAMES),
                      help=f"some of {', '.join(kernels.NAMES)}; default all")  # fmt: skip
    made.add_argument("--ratios", type=options.ratios, help="default: 2,4,8,16,32")
    made.add_argument("--repeats", type=options.count, help="rounds; default 10, on a GPU 30")
    args = made.parse_args(arguments)
    gpu = args.device == "cuda"
    args.dtype = args.dtype or (["bf16"] if gpu else list(models.DTYPES))
    with options.refusals(made):
        model = options.settle_common(args)
        options.check("kernels", args.kernels, kernels.NAMES)
        if gpu and not torch.cuda.is_available():
            raise ValueError("device must be cpu, PyTorch sees no GPU")
        found = arms(args.device)
        if not found:
            raise ValueError(f"no kernels for {args.device}: {extension.why_missing()}")
        if model.config.model_type == "bert":
            raise ValueError("model must be pre-norm without biases, as T5 is")
    names = ("device", "batch", "length", "bottleneck", "dtype", "threads")
    settings = options.chosen(args, *names)
    clocks: list[Wall] = [Graph("cuda"), Eager("cuda")] if gpu else [Wall()]
    ceilings = clocks[0].ceilings() if isinstance(clocks[0], Graph) else None
    content, console = options.begin("kernels", settings | {"ceilings": ceilings}, model)
    path = options.path_of(args, "kernels")
    ratios = args.ratios or ([4] if args.quick else [2, 4, 8, 16, 32])
    rounds = args.repeats or (2 if args.quick else 30 if gpu else 10)
    for dtype, k in itertools.product(args.dtype, ratios):
        layer = Sublayer(model, dtype, args.batch, args.length, args.bottleneck, args.device)
        for case in kernels.cases(layer, k, found, args.kernels):
            if case.arms:
                rows = run(case, clocks, rounds, warmup=1, ceilings=ceilings)
                content["rows"] += rows
                console.print(tables.timed(f"{case.title}, k={k}", rows))
        results.write(path, content)
    return options.finish(content, path, console)


if __name__ == "__main__":
    sys.exit(main())
