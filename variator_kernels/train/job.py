"""What one run of the command line trains, on what."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..methods.variator import calibration
from ..runtime.plan import Plan
from . import data
from .config import STEPS
from .evaluation import DENSE

NOISE = ("default", "none")


@dataclass(frozen=True)
class Job:
    """What to train on what. Paths are files or folders on this machine.

    ``step`` is ``"pretrain"`` or ``"adapt"``. ``ratios`` and ``placements`` empty, ``bottleneck``
    and ``activation`` None: those of ``plugins``, else 4, ``ffn``, 64 and tanh. ``level``: a
    mapping as :func:`patch` takes it for its ratio, instead of ``ratios`` and ``placements``: this
    one level is trained. ``plans``: files of :class:`Plan`, instead of these three: all their
    levels are trained. ``calibrate``: rows to calibrate on before the first step, 0 or at least 10.
    ``text``: the column of plain text, by default ``text``; or those that hold a task's text,
    one or two, by default ``sentence``. ``template``, such as ``"sst2 sentence: {sentence}"``,
    makes one text of a row's columns instead. ``labels``: the names a label may have, for a model
    that does not know them. ``max_length``: tokens of a piece in pre-training (128 if None); in
    adaptation longer texts are cut to it (None: they are an error if the model cannot take them).
    ``attention``: of ``transformers``, ``"eager"`` or ``"sdpa"``; None: the model's default.
    ``splice``: this part of the rows goes on with a piece of another row, see
    :func:`noise.spliced`. ``noise``: what pre-training does to text, ``"default"`` (masked tokens,
    corrupted spans) or ``"none"``. ``vary_lengths``: pre-training cuts each paragraph into pieces
    of a length drawn for it. ``keep_first``, ``keep_last``, ``keep``: the tokens that stay whole,
    as :func:`patch` takes them; None: as in ``plugins``, else patch's defaults. ``window``: the
    same, for decoders' ``attention_kv``.

    Decoders: plain text is one run of tokens, cut into rows of ``max_length`` (512 if None);
    ``noise`` does nothing. ``continuation``: the last so many tokens of a row are an answer to the
    others, its prompt: what ``logits_weight`` and ``task_weight`` look at. None: a quarter of a row
    if ``ffn`` is trained, else all of it. In adaptation ``text`` or ``template`` makes the prompt,
    ``label`` is the answer, and only with ``labels`` there is an accuracy.
    """

    step: str
    model: str
    data: str
    output: str
    ratios: tuple[int, ...] = ()
    placements: tuple[str, ...] = ()
    level: dict[str, Any] | None = None
    eval_data: str | None = None
    plugins: str | None = None
    calibrate: int = 0
    bottleneck: int | None = None
    activation: str | None = None
    backend: str = "auto"
    text: tuple[str, ...] = ()
    label: str = "label"
    template: str | None = None
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    attention: str | None = None
    splice: float = 0.0
    noise: str = "default"
    vary_lengths: bool = False
    keep_first: int | None = None
    keep_last: int | None = None
    keep: tuple[int, ...] | None = None
    window: int | None = None
    continuation: int | None = None
    plans: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"step must be one of {STEPS}, got {self.step!r}")
        if len(self.texts) > (1 if self.step == "pretrain" else 2):
            most = "one column" if self.step == "pretrain" else "one column or two"
            raise ValueError(f"text must name {most} in {self.step}, got {self.text}")
        if self.level is not None and (self.ratios or self.placements):
            raise ValueError(
                f"level must not be given beside ratios and placements, got {self.level} and "
                f"{self.ratios}, {self.placements}"
            )
        if self.plans is not None:
            if not self.plans:
                raise ValueError("plans must name at least one file, got none")
            if self.level is not None or self.ratios or self.placements:
                raise ValueError(
                    "plans must not be given beside level, ratios and placements, got "
                    f"{self.plans} and {self.level}, {self.ratios}, {self.placements}"
                )
            names = [Path(plan).stem for plan in self.plans]
            if len(set(names)) < len(names) or DENSE in names:
                raise ValueError(
                    "plans must be files of different names, which metrics will have, other than "
                    f"{DENSE!r}, got {names}"
                )
        least = calibration.LEAST
        if self.calibrate and self.calibrate < least:
            raise ValueError(f"calibrate must be 0 or at least {least} rows, got {self.calibrate}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be a number of tokens >= 1, got {self.max_length}")
        if self.continuation is not None and self.continuation < 1:
            raise ValueError(f"continuation must be tokens >= 1, got {self.continuation}")
        if self.continuation is not None and self.step == "adapt":
            raise ValueError(
                f"continuation may be set in pretrain alone, got {self.continuation}: an answer is "
                "as long as it is"
            )
        if self.noise not in NOISE:
            raise ValueError(f"noise must be one of {NOISE}, got {self.noise!r}")
        if self.step == "adapt" and (self.noise, self.vary_lengths) != ("default", False):
            got = f"{self.noise!r} and {self.vary_lengths}"
            raise ValueError(f"noise and vary_lengths may be set in pretrain alone, got {got}")
        if not 0 <= self.splice <= 1:
            raise ValueError(f"splice must be a part from 0 to 1, got {self.splice}")

    @functools.cached_property
    def levels(self) -> dict[str, Plan]:
        """The plans, by the names of their files, which are read once.

        Raises:
            FileNotFoundError, ValueError: as :meth:`Plan.load`.
        """
        return {Path(path).stem: Plan.load(path) for path in self.plans or ()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of text."""
        return self.text or (data.TEXT if self.step == "pretrain" else "sentence",)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row of the data must have."""
        if self.step == "pretrain":
            return self.texts
        if self.template is None:
            return (*self.texts, self.label)
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(
                f"template must name columns: {error}, got {self.template!r}"
            ) from None
        fields = dict.fromkeys(name for _, name, _, _ in parsed if name is not None)
        if not fields or "" in fields:
            raise ValueError(f"template must name columns, {{sentence}}, got {self.template!r}")
        return (*fields, self.label)
