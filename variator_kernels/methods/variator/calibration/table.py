"""What a calibration reports."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """The model's final error with one site compressed, or with all of them.

    The error is the relative squared error of the last hidden state, on sequences that were held
    out from the fit.
    """

    ratio: int | None
    """Of the site, or of all; None: of all, and they differ."""
    layer: int | None
    """The only site that is compressed; None: all are."""
    before: float
    """With the values that the plugins had."""
    after: float
    step: float | None
    """0: the values before stay; 1: the fitted ones; between: these, shrunk."""
    placement: str = "ffn"
    """Of that site; of all sites, empty."""


class Calibration(NamedTuple):
    """The rows of :func:`~.calibrate_model.calibrate`; ``str()`` is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = ["ratio  placement     layer  error before  after   step"]
        for row in self.rows:
            layer = "all" if row.layer is None else str(row.layer)
            step = "" if row.step is None else f"{row.step:.2f}"
            ratio = "mixed" if row.ratio is None else str(row.ratio)
            lines.append(
                f"{ratio:>5}  {row.placement:12}  {layer:>5}  {row.before:12.4f}  "
                f"{row.after:.4f}  {step}".rstrip()
            )
        return "\n".join(lines)
