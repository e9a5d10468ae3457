"""The GPU report's rows beside sublayers: attention over merged keys, the FFN's products."""

from __future__ import annotations

import torch

from bench import gpu
from bench.cases import attention, products
from bench.harness import checks
from bench.harness.clock import Graph
from variator_kernels import backends

CEILINGS = {"copy": 1e9, "matrix": 1e9}


def test_attention_is_ours_on_triton_or_has_no_row(monkeypatch):
    """On a GPU, where the reference has a row of its own."""
    asked = []
    monkeypatch.setattr(attention.Work, "call", lambda work, arm: asked.append(work.backend))
    job = gpu.Job("attention", "bert-base", 1, 8, (4, 1), gpu.ATTENTION)
    for usable, arms in ((("triton", "cuda"), gpu.ATTENTION), ((), gpu.ATTENTION[:-1])):
        monkeypatch.setattr(gpu, "usable", lambda usable=usable: usable)
        found = gpu.cases(job, "cpu", dry=False)
        assert [tuple(arm.key.arm for arm in case.arms) for case in found] == [arms, arms]
        for case in found:
            case.arms[-1].build()
    assert asked == ["triton", "triton", "reference", "reference"]
    assert {case.name for case in found} == {"attention"}


def test_attention_without_its_kernel_is_a_failure(monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: ("triton",))
    why_not = backends.Status("triton", False, "no GPU")
    monkeypatch.setattr("variator_kernels.backends.status", lambda: [why_not])
    job = gpu.Job("attention", "t5-base", 1, 8, (4,), (attention.SDPA, attention.OURS))
    (_, ours) = gpu.measure(job, Graph("cpu"), CEILINGS, 1, dry=True)
    assert (ours["status"], ours["reason"]) == ("failed", "no GPU")


def test_products_are_the_ffns_of_merged_rows():
    job = next(job for job in gpu.JOBS if (job.name, job.model) == ("products", "llama-7b"))
    shapes = []
    for case in gpu.cases(job._replace(batch=1, length=8), "cpu", dry=True):
        assert [arm.key.arm for arm in case.arms] == list(products.ARMS)
        (exact,) = case.truth(case.arms[0].key).exact
        shapes.append((case.name, tuple(exact.shape), case.arms[0].tokens))
        assert case.truth(case.arms[0].key).relative == checks.QUANTISED
    # Of a toy's 32 x 48, 16 tokens at k=4.
    assert shapes == [("products in", (4, 48), 4), ("products out", (4, 32), 4)]


def test_a_product_that_the_device_lacks_is_skipped_and_a_wrong_one_fails(monkeypatch):
    def lacking(*_):
        raise RuntimeError("needs compute capability 8.9\nand more")

    job = next(job for job in gpu.JOBS if job.name == "products")
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: lacking())
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: 2 * (a.int() @ b.int()))
    rows = gpu.measure(job, Graph("cpu"), CEILINGS, 1, dry=True)
    found = {row["arm"]: (row["status"], row["reason"].split(",")[0]) for row in rows}
    assert found["linear"][0] == "ok" and found["int8"][0] == "failed"
    assert found["fp8"] == ("skipped", "RuntimeError: needs compute capability 8.9")
    assert not any("median" in row for row in rows if row["arm"] != "linear")
