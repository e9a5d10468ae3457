"""What a server is told, by environment variables: replicas of Ray read them too."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "build" / "serve"


@dataclass(frozen=True)
class Settings:
    """Each field is read from ``SERVE_<FIELD>``."""

    model: str = str(FOLDER / "model")
    plugins: str = str(FOLDER / "plugins")
    profile: str = str(FOLDER / "profile.json")
    """Measured at the first start; delete it when the machine has become another."""
    levels: str = "1,2,4"
    target: float = 0.25
    """Seconds from a request's arrival to its answer."""
    max_ratio: int = 0
    """0: none."""
    batch_tokens: int = 256
    """Of one forward, padding included."""
    most_tokens: int = 128
    """Of a request."""
    most_waiting: int = 5000
    """Requests; more are refused, which is better than an answer that nobody waits for."""
    threads: int = 1
    """That the model computes with."""

    @classmethod
    def read(cls) -> Settings:
        given: dict[str, Any] = {}
        for field in fields(cls):
            text = os.environ.get(f"SERVE_{field.name.upper()}")
            if text is not None:
                given[field.name] = type(getattr(cls, field.name))(text)
        return cls(**given)
