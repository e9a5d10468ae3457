"""Files that appear whole or not at all, and JSON that says nothing twice."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write to a temporary file beside ``path``, then rename."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        writer(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parsed(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or has a field twice. RecursionError: it is too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has {max(names, key=names.count)!r} twice")
        return fields

    return json.loads(text, object_pairs_hook=once)
