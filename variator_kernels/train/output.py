"""The folder of a run: whose it is, and what stands in it besides what was trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import files
from . import checkpoints

SETTINGS, METRICS = "run.json", "metrics.json"


def digest(source: str | None) -> str | None:
    """Of a file's content; None for what is no file."""
    path = Path(source or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def check_same(output: Path, settings: dict[str, Any], kinds: tuple[Any, ...]) -> None:
    """A folder that holds a run must hold this one. ``kinds``: dataclasses of the settings, whose
    defaults stand for what the version that wrote them did not have.

    Raises:
        ValueError: it is another run's, or no folder of runs.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if (output / "config.json").is_file():
        raise ValueError(f"output must be a folder of its own, {output} holds a model")
    if not (output / SETTINGS).is_file():
        if checkpoints.every(output):
            raise ValueError(f"output {output} holds another program's checkpoints: name another")
        return
    before = {field.name: field.default for kind in kinds for field in fields(kind)}
    before = {name: before[name] for name in settings if name in before}
    before |= json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    for name in {**before, **settings}:
        if name != "output" and before.get(name) != settings.get(name):
            raise ValueError(
                f"output {output} holds a run with {name}={before.get(name)!r}, now it is "
                f"{settings.get(name)!r}: name another folder, or the same settings"
            )


def write(path: Path, content: Any) -> None:
    """JSON, at once or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    files.replace(path, lambda to: to.write_text(text, encoding="utf-8"))
