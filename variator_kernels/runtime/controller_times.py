"""How long a forward takes at each level, over rows and tokens: a table."""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files
from ..version import __version__

FORMAT = 1


@dataclass(frozen=True)
class LevelTimes:
    """Seconds of one forward: a table by level, rows and tokens a row. It belongs to the model,
    machine and number of threads that it was measured with, and knows the levels' names alone.

    Raises:
        ValueError: the table does not fit its axes, or holds something else than positive times.
    """

    names: tuple[str, ...]
    """Of the levels."""
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens a row."""
    seconds: tuple[tuple[tuple[float, ...], ...], ...]
    """``[level][rows][length]``."""

    def __post_init__(self) -> None:
        for name in ("rows", "lengths"):
            axis = getattr(self, name)
            ascending = all(a < b for a, b in itertools.pairwise(axis))
            if not axis or not ascending or not all(type(v) is int and v >= 1 for v in axis):
                raise ValueError(f"{name} must be ascending integers >= 1, got {axis!r}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be different and at least one, got {self.names!r}")
        shape = len(self.names), len(self.rows), len(self.lengths)
        cells = [t for table in self.seconds for row in table for t in row]
        fits = len(self.seconds) == shape[0] and all(
            len(table) == shape[1] and all(len(row) == shape[2] for row in table)
            for table in self.seconds
        )
        if not fits or not all(isinstance(t, float) and 0 < t < math.inf for t in cells):
            raise ValueError(f"seconds must hold {shape} positive finite floats")

    def predict(self, level: int, rows: float, tokens: float) -> float:
        """Seconds of a forward of ``tokens`` in ``rows`` rows of the same length at level number
        ``level``: linear between the cells, in proportion to the tokens beyond the last ones; below
        the first ones, what these take."""
        table = self.seconds[level]
        rows = max(rows, 1e-9)
        length = tokens / rows
        i, a, beyond_rows = _place(self.rows, rows)
        j, b, beyond_lengths = _place(self.lengths, length)
        low = table[i]
        value = low[j] if not b else low[j] + b * (low[j + 1] - low[j])
        if a:
            high = table[i + 1]
            value += a * ((high[j] if not b else high[j] + b * (high[j + 1] - high[j])) - value)
        return value * beyond_rows * beyond_lengths

    def only(self, names: tuple[str, ...]) -> LevelTimes:
        """Those of some levels, in this order.

        Raises:
            ValueError: one is not there.
        """
        if missing := [name for name in names if name not in self.names]:
            raise ValueError(f"profile must hold the levels {names}, it lacks {missing}")
        seconds = tuple(self.seconds[self.names.index(name)] for name in names)
        return LevelTimes(names, self.rows, self.lengths, seconds)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a JSON file, at once or not at all."""
        content = {"format": FORMAT, "written_by": __version__, **asdict(self)}
        text = json.dumps(content, indent=1) + "\n"
        files.replace(Path(path), lambda to: to.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LevelTimes:
        """The times in a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds no times, or those of
            another format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a file of times, there is no file {path}")
        try:
            given = files.parsed(Path(path).read_text(encoding="utf-8"))
            if given["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {given['format']!r}")
            table = tuple(tuple(map(tuple, rows)) for rows in given["seconds"])
            return cls(tuple(given["names"]), tuple(given["rows"]), tuple(given["lengths"]), table)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"path {path} holds no times that can be read: {error}") from error


def _place(axis: tuple[int, ...], value: float) -> tuple[int, float, float]:
    """The cell below, how far to the next, and how much further than the last one."""
    if value <= axis[0]:
        return 0, 0.0, 1.0
    last = len(axis) - 1
    if value >= axis[last]:
        return last, 0.0, value / axis[last]
    i = bisect_right(axis, value) - 1
    return i, (value - axis[i]) / (axis[i + 1] - axis[i]), 1.0
