"""bench.kernels: each kernel alone, checked under every instruction set."""

import json

import pytest

from bench import internals, kernels
from tests.bench.conftest import one_ffn
from variator_kernels import extension

KERNELS = pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")
ON_CPU = ("group_merge", "adapter_decompress", "group_merge_backward",
          "adapter_decompress_backward", "compressed_ffn", "compressed_ffn_backward")  # fmt: skip


def run(model, folder):
    arguments = ["--model", model, "--quick", "--dtype", "fp32", "--length", "21"]
    code = kernels.main([*arguments, "--output", str(folder)])
    return code, json.loads((folder / "kernels.json").read_text())["rows"]


@KERNELS
def test_every_kernel_under_every_instruction_set(tiny, tmp_path):
    code, rows = run(tiny, tmp_path)
    isas = extension.load().available_isas()
    before = extension.load().active_isa()
    assert code == 0 and [row["arm"] for row in rows] == list(isas) * len(ON_CPU)
    assert list(dict.fromkeys(row["case"] for row in rows)) == list(ON_CPU)
    assert all(row["error"] <= row["allowed"] and row["median"] > 0 for row in rows)
    assert extension.load().active_isa() == before


@KERNELS
@one_ffn
def test_a_wrong_kernel_has_no_number(tiny, tmp_path, monkeypatch):
    right = internals.adapter_decompress
    monkeypatch.setattr(internals, "adapter_decompress", lambda *args: right(*args) + 1e-3)
    code, rows = run(tiny, tmp_path)
    failed = {row["case"] for row in rows if row["status"] == "failed"}
    assert code == 1 and failed == {"adapter_decompress"}
    assert not any("median" in row for row in rows if row["status"] == "failed")
