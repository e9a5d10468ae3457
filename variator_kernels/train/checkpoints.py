"""Checkpoint folders that are whole: a run can be killed while it writes one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

STARTED, COMPLETE = "started", "complete"
"""The marks of a folder that is ours: unfinished, or whole. Folders with neither are left alone."""
_NAME = re.compile(r"checkpoint-(\d+)$")


def start(folder: Path) -> None:
    """Make ``folder``, or go back on what was declared of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).touch()
    (folder / COMPLETE).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Declare all that ``folder`` holds to be written, after it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    os.replace(folder / STARTED, folder / COMPLETE)
    _sync(folder)


def last(output: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint under ``output``."""
    return max(_marked(Path(output), COMPLETE), key=_step, default=None)


def clean(output: Path, keep: int | None, *spared: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints, and whole ones beyond the newest ``keep`` (None: all stay)."""
    whole = sorted(_marked(output, COMPLETE), key=_step)
    gone = [] if keep is None else whole[: -max(keep, 1)]
    for path in {*gone, *_marked(output, STARTED)} - {Path(name) for name in spared}:
        start(path)  # half a folder must not pass for a whole one
        shutil.rmtree(path)


def every(output: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints under ``output``, whoever wrote them."""
    found = Path(output).glob("checkpoint-*")
    return [path for path in found if _NAME.search(path.name) and path.is_dir()]


def _marked(output: Path, mark: str) -> list[Path]:
    return [path for path in every(output) if (path / mark).is_file()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
