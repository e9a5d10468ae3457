"""Compiles what ``max-autotune`` tries for a model: ``python -m bench.tools.gpu_report.warm``.

Most of its time goes to compiling candidates; the report does that beside its tests. Which one is
the fastest is found out again when it is measured, alone on the GPU.
"""

from __future__ import annotations

import argparse

from bench import gpu
from bench.cases import Key, models
from bench.cases.sublayer import Sublayer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=models.SUBLAYERS, required=True)
    name = parser.parse_args(arguments).model
    model = models.Architecture(name, models.SUBLAYERS[name](), None)
    for job in (job for job in gpu.JOBS if job.model == name and job.compiles):
        layer = Sublayer(model, "bf16", job.batch, job.length, device="cuda", kernels="triton")
        for arm in (arm for arm in job.arms if arm.endswith("-compiled")):
            for k in (None,) if arm.startswith("hf") else job.ratios:
                layer.build(Key(arm, k))()


if __name__ == "__main__":
    main()
