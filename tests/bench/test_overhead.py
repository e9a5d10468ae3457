"""bench.overhead: a number with equal outputs, and none without."""

import json
import os
import subprocess
import sys

import pytest

from bench import internals, overhead
from tests.bench.conftest import one_bert, one_ffn
from tests.emulation import BUILT
from variator_kernels import extension

KERNELS = pytest.mark.skipif(extension.load() is None, reason="the kernels are not built")


def run(model, folder):
    code = overhead.main(["--model", model, "--rounds", "5", "--output", str(folder)])
    *rows, triton, cuda = json.loads((folder / "overhead.json").read_text())["rows"]
    assert [row["case"] for row in (triton, cuda)] == ["launches"] * 2
    return code, rows


def sublayers(found):
    code, rows = found
    return code, [row for row in rows if row["case"] == "overhead"]


@KERNELS
def test_measures_a_sublayer(tiny, tmp_path):
    code, (row,) = sublayers(run(tiny, tmp_path))
    assert code == 0 and row["status"] == "ok" and len(row["samples"]) == 5
    assert row["q1"] <= row["median"] <= row["q3"]


@KERNELS
def test_measures_a_bert(tiny_bert, tmp_path):
    assert run(tiny_bert, tmp_path)[0] == 0


@KERNELS
@one_ffn
def test_other_outputs_have_no_number(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(internals, "ffn_sublayers", lambda model: [lambda x: x + 1])
    code, (row,) = sublayers(run(tiny, tmp_path))
    assert code == 1 and row["status"] == "failed" and "median" not in row


@one_bert
def test_switches_are_timed_beside_a_thread(tiny_bert, tmp_path):
    code, rows = run(tiny_bert, tmp_path)
    switches = [row for row in rows if row["case"] == "switch"]
    assert code == 0 and [row["arm"] for row in switches] == ["set_ratio", "use_ratio"]
    (controller,) = [row for row in rows if row["case"] == "controller"]
    assert controller["status"] == "ok" and len(controller["samples"]) == 5
    for row in switches:
        assert row["status"] == "ok" and len(row["samples"]) == 5 and row["forwards"] > 0
        assert row["tensors"] == 0 and row["limit"] == 20.0


@one_bert
def test_a_switch_to_another_level_has_no_number(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(internals, "level", lambda model: (1, 1))
    code, rows = run(tiny_bert, tmp_path)
    assert code == 1
    failed = [row for row in rows if row["case"] == "switch"]
    assert all(row["status"] == "failed" and "median" not in row for row in failed)


LAUNCHES = """
from bench import overhead
row = overhead.measure_launches(5)
assert row["status"] == "ok" and row["q1"] <= row["median"] <= row["q3"], row
overhead.LAUNCHES = overhead.LAUNCHES[:2]
assert overhead.measure_launches(5)["status"] == "failed"
"""


def test_measures_the_public_op_with_stubbed_launches():
    pytest.importorskip("triton", reason="Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], env=env, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not list(BUILT.glob("_cuda*.so")), reason="the emulation is not built")
def test_measures_the_public_op_on_cuda(monkeypatch):
    row = overhead.measure_cuda(5)
    assert row["status"] == "ok" and len(row["samples"]) == 5, row
    assert row["arm"] == "cuda" and row["q1"] <= row["median"] <= row["q3"]
    monkeypatch.setattr(overhead.machine, "ROOT", BUILT)
    assert overhead.measure_cuda(5)["status"] == "skipped"
