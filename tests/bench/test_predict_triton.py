"""Predictions from machine code: what a warp issues, and how often."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.tools import predict_triton
from bench.tools.predict_triton import Count, count

# Two loops, the second with a product and shared memory, behind it a subroutine.
CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;                     /* 0x1 */
        /*0010*/                   FADD R1, R1, R2 ;                      /* 0x1 */
        /*0020*/              @!P5 BRA 0x10 ;                             /* 0x1 */
        /*0030*/                   LDS.128 R4, [R2] ;                     /* 0x1 */
        /*0040*/                   LDSM.16.M88.4 R4, [R2] ;               /* 0x1 */
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;  /* 0x1 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x1 */
        /*0070*/              @P1  BRA `(.L_x_1) ;                        /* 0x1 */
        /*0080*/               @P0 BRA 0x30 ;                             /* 0x1 */
        /*0090*/                   EXIT ;                                 /* 0x1 */
        /*00a0*/                   BRA 0xa0 ;                             /* 0x1 */
        /*00b0*/                   BRA 0x90 ;                             /* 0x1 */
"""


def test_loops_count_as_often_as_they_run():
    flops = 2 * 64 * 128 * 16 / 4 + 2 * 16 * 8 * 16
    assert count(CODE, [10, 3]) == Count(1 + 2 * 10 + 6 * 3 + 1, 3 * flops, 3 * (512 + 512))


def test_an_unknown_loop_is_refused():
    with pytest.raises(ValueError, match="the machine code has 2 loops, 1 are expected"):
        count(CODE, [10])


def test_the_page_says_what_it_is(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "bench.tools.predict_triton", "--model", "bert-base"]
    done = subprocess.run([*command, "--ratio", "4", "--output", str(page)], env=env, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (page.read_text(), predict_triton.OUTPUT.read_text()):
        assert "never measured" in text and "No GPU was used" in text
        assert "group_merge_kernel" in text and "adapter_decompress_kernel" in text
    (decompress,) = (line for line in page.read_text().splitlines() if "adapter_decompress" in line)
    memory = float(decompress.split("|")[10])
    # x, y, u and W_1h h once: 16,384 tokens of 768 bf16 twice and of 64 fp32, a quarter of u.
    least = 16384 * (768 * 2 * 2.25 + 64 * 4) / 4.8e12 * 1e6
    assert least < memory < 1.1 * least, json.dumps(re.split(r" *\| *", decompress))
