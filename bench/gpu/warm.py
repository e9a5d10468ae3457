"""Compiles what ``max-autotune`` tries for a model: ``python -m bench.gpu.warm --model t5-base``.

Most of its time goes to compiling candidates; the report does that beside its tests. Which one is
the fastest is found out again when it is measured, alone on the GPU.
"""

from __future__ import annotations

import argparse

import torch

from .cases import CASES
from .measure import Arms
from .sublayers import MODELS, Sublayer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=MODELS, required=True)
    model = parser.parse_args(arguments).model
    for case in (case for case in CASES if case.model == model and case.compiles):
        layer = Sublayer(MODELS[model], case.batch, case.length, "cuda", torch.bfloat16)
        for k in case.ratios:
            arms = Arms(layer, k, case.backward, "reference")
            for arm in (arm for arm in case.arms if arm.endswith("-compiled")):
                torch._dynamo.reset()
                arms.call(arm)()


if __name__ == "__main__":
    main()
