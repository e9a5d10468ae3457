"""Checkpoint folders that are whole: a run can be killed while it writes one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

COMPLETE = "complete"
"""Written last, so a folder without it was never finished."""
_NAME = re.compile(r"checkpoint-(\d+)$")


def finish(folder: Path) -> None:
    """Declare all that ``folder`` holds to be written, after it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    (folder / COMPLETE).touch()
    _sync(folder)


def last(output: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint under ``output``."""
    return max(_whole(Path(output)), key=_step, default=None)


def clean(output: str | os.PathLike[str], keep: int | None, best: str | None = None) -> None:
    """Remove unfinished checkpoints, and whole ones beyond the newest ``keep`` (None: all stay)."""
    whole = sorted(_whole(Path(output)), key=_step)
    kept = set(whole if keep is None else whole[-max(keep, 1) :])
    kept |= {path for path in whole if best and path == Path(best)}
    for path in set(_all(Path(output))) - kept:
        # First the mark: half a folder must not pass for a whole one.
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


def _all(output: Path) -> list[Path]:
    return [p for p in output.glob("checkpoint-*") if _NAME.search(p.name) and p.is_dir()]


def _whole(output: Path) -> list[Path]:
    return [path for path in _all(output) if (path / COMPLETE).is_file()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
