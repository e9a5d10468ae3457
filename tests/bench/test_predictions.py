"""Measured kernels beside their predicted bounds, with figures that are made up."""

from __future__ import annotations

import json

import pytest

from bench import gpu, predictions
from bench.harness import tables

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
TRITON_BACKWARD = (
    "score_gradient_kernel", "merge_backward_kernel", "weight_sums_kernel",
    "inner_gradient_kernel", "group_gradient_kernel", "weight_sums_kernel",
)  # fmt: skip


def measured(case, us, arm="triton", model="t5-base", k=4, status="ok"):
    return {"case": case, "arm": arm, "model": model, "batch": 32, "length": 512, "k": k,
            "dtype": "bf16", "status": status, "median": us / 1e6}  # fmt: skip


def predicted(kernels, backend="triton", part="forward", k=4):
    """Bounds of 1, 2, 4, ... us on an H200, ten times that on an H100."""
    common = {"part": part, "backend": backend, "model": "t5-base", "k": k, "size": "32 x 512"}
    return [{**common, "kernel": kernel, "bound": float(2**n), "H100": 10.0 * 2**n}
            for n, kernel in enumerate(kernels)]  # fmt: skip


@pytest.fixture
def figures(monkeypatch, tmp_path):
    def use(rows):
        path = tmp_path / "predicted.json"
        path.write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(predictions, "FIGURES", path)

    return use


@pytest.mark.parametrize(
    ("name", "chip"),
    [(H100, "H100"), (H200, "H200"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
     ("NVIDIA GH200 480GB", None), ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA A100", None),
     (None, None)],
)  # fmt: skip
def test_predictions_are_of_two_chips(name, chip):
    assert predictions.chip(name) == chip


def test_measured_bound_and_share(figures):
    kernels = ("group_merge_kernel", "weighted_sum_kernel", "linear_kernel",
               "adapter_decompress_kernel", "row_norm_kernel")  # fmt: skip
    figures(predicted(kernels))
    rows = [measured("group_merge", 6.0), measured("adapter_decompress", 4.0),
            measured("group_merge", 6.0, arm="cuda"), measured("group_merge", 6.0, k=8),
            measured("group_merge", 6.0, model="t5-large"), measured("product in", 6.0),
            {**measured("group_merge", 6.0), "length": 1},
            {**measured("group_merge", 6.0), "dtype": "fp16"},
            measured("group_merge", 6.0, status="failed")]  # fmt: skip
    merge, decompress = predictions.compared(rows, H200)
    assert merge["launches"] == ["group_merge_kernel", "weighted_sum_kernel"]
    assert (merge["measured"], merge["bound"], merge["share"]) == pytest.approx((6, 3, 0.5))
    assert merge["note"] == "" and decompress["bound"] == 8
    assert decompress["note"] == "below its bound: the model is wrong"
    (on_h100, _) = predictions.compared(rows, H100)
    assert on_h100["bound"] == 30 and on_h100["chip"] == "H100"
    assert predictions.compared(rows, "NVIDIA A100") == []
    table = tables.markdown(predictions.COLUMNS, [merge])
    assert "| group_merge | triton | t5-base, 32 x 512 | 4 | 6.0 | 3.0 | 0.50 |" in table


def test_both_backward_passes_end_with_sums(figures):
    figures(predicted(TRITON_BACKWARD, part="backward"))
    cases = ("group_merge_backward", "adapter_decompress_backward")
    found = predictions.compared([measured(case, 100.0) for case in cases], H200)
    assert [row["bound"] for row in found] == [1 + 2 + 4, 8 + 16 + 32]


def test_the_first_product_of_a_gated_sublayer_is_one(figures):
    first, second = "gemm_sm90_128x192: 3072 x 768", "gemm_sm90_128x192: 768 x 3072"
    figures(predicted((first, first, second), "cuda"))
    rows = [measured(f"product {way}", 100.0, "cuda") for way in ("in", "out")]
    assert [row["bound"] for row in predictions.compared(rows, H200)] == [1, 4]


def test_every_predicted_launch_of_a_kernel_alone_has_its_case():
    """Of the committed figures: what has none is no kernel of those cases."""
    rows, of, before = json.loads(predictions.FIGURES.read_text())["rows"], {}, None
    for row in (row for row in rows if row["part"] != "attention"):
        before = predictions.case_of(row["kernel"], before)
        of.setdefault(before, set()).add(row["kernel"])
    assert of.pop(None) <= {"linear_kernel", "row_norm_kernel", "one_launch_kernel"}
    bounds = predictions.bounds("H200", rows)
    t5 = {key[:2] for key in bounds if key[2:] == ("t5-base", 32, 512, 4) and key[0]}
    forward, backward = ("group_merge", "adapter_decompress"), "_backward"
    both = {(case + way, arm) for case in forward for way in ("", backward)
            for arm in ("triton", "cuda")}  # fmt: skip
    assert t5 == both | {("product in", "cuda"), ("product out", "cuda")}
    assert ("product in", "cuda", "t5-base", 1, 512, 4) in bounds
    merge = bounds[("group_merge_backward", "triton", "t5-base", 32, 512, 4)]
    assert list(merge) == list(TRITON_BACKWARD[:3])


TARGETS = [target for target in gpu.TARGETS if target.arm == gpu.ALONE]


@pytest.mark.parametrize(
    ("over_floor", "share", "value", "met"),
    [(1.25, None, 0.8, False), (1.25, 0.86, 0.86, True), (1.1, 0.5, 1 / 1.1, True),
     (None, None, None, None)],
)  # fmt: skip
def test_the_target_of_kernels_alone_takes_the_better_of_two(over_floor, share, value, met):
    row = measured("adapter_decompress", 10.0, "cuda")
    if over_floor is not None:
        row["over_floor"] = over_floor
    beside = [{**row, "share": share}] if share else []
    few = {**row, "batch": 1}  # a launch takes as long as its bytes
    (found,) = gpu.verdicts([], [row, few, {**row, "case": "product in"}], beside)
    assert found["value"] == (value if value is None else pytest.approx(value))
    assert found["met"] is met and found["limit"] == 0.85
    assert found["where"] == "t5-base, 32 x 512, k=4, adapter_decompress on cuda"
    assert {(t.case, t.of) for t in TARGETS} == {
        (case, arm) for case in ("group_merge", "adapter_decompress") for arm in ("triton", "cuda")
    }


def test_the_report_shows_the_table(figures):
    figures(predicted(("group_merge_kernel",)))
    alone = [{**measured("group_merge", 0.5), "over_floor": 1.0}]
    found = predictions.compared(alone, H200)
    report = {"rows": [], "kernels": [], "predictions": found}
    title = gpu.shown(report)[0].title
    assert title == "single kernels and their predicted bounds"
    assert predictions.BELOW in list(gpu.shown(report)[0].columns[-1].cells)
