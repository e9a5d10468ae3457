"""An import leaves the driver alone, seen by a libcuda.so.1 that writes down what is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tools import cuda_resources

ROOT = Path(__file__).parents[2]
# The runtime finds the driver's functions by cuGetProcAddress, so that has to work too.
STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int called(const char* name) {
    FILE* log = fopen(getenv("STAND_IN_LOG"), "a");
    fprintf(log, "%s\n", name);
    fclose(log);
    return 0;
}
static int other(void) { return called("other"); }
int cuInit(unsigned flags) { return called("cuInit"); }
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return called("cuDriverGetVersion");
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags,
                        void* status) {
    called("cuGetProcAddress");
    *function = (void*)other;
    if (strcmp(name, "cuInit") == 0) *function = (void*)cuInit;
    if (strcmp(name, "cuDriverGetVersion") == 0) *function = (void*)cuDriverGetVersion;
    if (strcmp(name, "cuGetProcAddress") == 0) *function = (void*)cuGetProcAddress_v2;
    return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""


@pytest.fixture
def calls(tmp_path):
    """Runs Python code in a process of its own; returns the driver's functions it called."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, log = tmp_path / "stand_in.c", tmp_path / "log"
    source.write_text(STAND_IN)
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libcuda.so.1")],
        check=True,
    )

    def run(code: str, **env: str) -> tuple[set[str], str]:
        log.write_text("")
        env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "STAND_IN_LOG": str(log), **env}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return set(log.read_text().split()), done.stdout.strip()

    return run


def test_the_drivers_version_needs_no_initialisation(calls):
    """Where cuInit ran, a forked child has no GPU and CUDA_VISIBLE_DEVICES comes too late."""
    code = "from variator_kernels import cuda_support; print(cuda_support._driver_version())"
    called, version = calls(code)
    assert version == "13000"
    assert "cuDriverGetVersion" in called and "cuInit" not in called


@pytest.mark.skipif(cuda_resources.module_path() is None, reason="no CUDA kernels were compiled")
def test_importing_with_the_compiled_kernels(calls):
    called, architectures = calls(
        "from variator_kernels import extension; print(extension.load('cuda').architectures)",
        VARIATOR_CUDA_EXTENSION="",
    )
    assert architectures
    assert called == {"cuDriverGetVersion"}
