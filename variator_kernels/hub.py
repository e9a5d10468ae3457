"""Plugin folders on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def located(source: str | os.PathLike[str], names: tuple[str, ...]) -> Path:
    """``source`` on this machine; a hub id, ``"owner/name"``, is downloaded into the hub's cache.

    What exists here goes first. Of a repository only files of these ``names`` are fetched.

    Raises:
        FileNotFoundError: neither a file or folder here nor, as far as can be told, on the hub.
    """
    path = Path(source)
    if path.exists() or not isinstance(source, str) or not _ID.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download

    wanted = [*names, *(f"*/{name}" for name in names)]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # no network, no such repository, no token
        raise FileNotFoundError(
            f"source must be a folder of plugins or a hub id, there is no folder {source!r} here, "
            f"and from the hub comes: {error}"
        ) from error
