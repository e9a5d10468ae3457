"""One product, ours beside oneDNN's: no arm has a number that float64 does not confirm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import internals, products
from bench.harness import tables

SMALL = {"in": (64, 96), "out": (96, 64)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SHAPES", SMALL)


def run(folder: Path) -> tuple[int, list[dict]]:
    code = products.main(
        ["--rows", "1,40", "--dtype", "fp32", "--rounds", "2", "--output", str(folder)]
    )
    return code, json.loads((folder / "products.json").read_text())["rows"]


def test_every_arm_is_in_the_table(tmp_path: Path) -> None:
    code, rows = run(tmp_path)
    assert code == 0 and {row["status"] for row in rows} <= {"ok", "skipped"}
    header, _, *lines = tables.markdown(products.columns(rows), products.lines(rows)).splitlines()
    assert len(lines) == len(SMALL) * 2 and "96 to 64" in lines[-1]
    assert "F.linear" in header and "ours" in header


def test_a_wrong_product_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = internals.product

    def wrong(arm: str, weight: torch.nn.Parameter, rows: int) -> object:
        made = real(arm, weight, rows)
        return (lambda x: made(x) * 1.01) if arm == products.OURS and made else made

    monkeypatch.setattr(internals, "product", wrong)
    code, rows = run(tmp_path)
    ours = [row for row in rows if row["arm"] == products.OURS and row["dtype"] == "fp32"]
    assert code == 1 and {row["status"] for row in ours} == {"failed"}
    assert not any("median" in row for row in ours)
    assert not any(products.OURS in line for line in products.lines(rows))
