"""The table of what the CUDA kernels use; neither nvcc nor a GPU is needed."""

from __future__ import annotations

from bench.tools import cuda_resources


def test_rows_of_architectures_that_were_not_built_are_kept():
    now = [{"kernel": "k", "variant": "bf16", "arch": "sm_100", "registers": 2}]
    old = [{**now[0], "registers": 1}, {**now[0], "arch": "sm_80"}, {**now[0], "arch": "sm_120"}]
    rows = cuda_resources.added(old, now)
    assert [(row["arch"], row["registers"]) for row in rows] == [
        ("sm_80", 2), ("sm_100", 2), ("sm_120", 2),
    ]  # fmt: skip
