"""Runs setup.py on the small tree of conftest.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what it says to a build, and ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VARIATOR_")}
    kept.pop("LD_PRELOAD", None)  # the sanitizers are no concern of the compiler's
    return {**kept, "VARIATOR_CUDA": "0", **more}


def build(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *args],
        cwd=tree,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def build_info(package: Path) -> dict:
    return json.loads((package / "_build_info.json").read_text())


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
