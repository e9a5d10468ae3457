"""What is measured, described once: an FFN sublayer, an encoder, each kernel alone.

A :class:`Case` is one input and the arms that run on it. Benchmarks on the CPU and on a GPU, and
tests, take the same cases.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..harness.checks import Outputs, Truth

Call = Callable[[], Outputs]
SETTLED_TOKENS = 512
"""Up to so many an encoder's timed call follows an untimed one, as a sublayer's does."""


class Key(NamedTuple):
    """What tells the arms of a case apart."""

    arm: str
    k: int | None = None
    padding: str = "none"
    placements: tuple[str, ...] = ("ffn",)
    """Of an arm with plugins."""
    dtype: str = ""
    """Where the arms of a case differ in it; otherwise the case has it."""

    def __str__(self) -> str:
        return self.name if self.k is None else f"{self.beside()} k={self.k}"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.arm, self.dtype)))

    def beside(self, placements: tuple[str, ...] = ("ffn",)) -> str:
        """The arm's name among those of the same round, to an arm with these placements."""
        if self.k is None or self.placements == placements:
            return self.name
        return f"{self.name}, {' + '.join(self.placements)}"


class Work(NamedTuple):
    """What one phase must do at least: bytes moved and FLOPs of matrix products."""

    bytes: int = 0
    flops: int = 0

    def seconds(self, ceilings: dict[str, float]) -> float:
        """The phase's floor: memory and matrix units work beside each other."""
        return max(self.bytes / ceilings["copy"], self.flops / ceilings["matrix"])


@dataclass
class Arm:
    """One way to compute; ``build`` returns the call, or raises ``Unavailable``."""

    key: Key
    build: Callable[[], Call]
    tokens: int
    bound: float | None = None
    """The speed-up over dense if time were multiply-adds."""
    work: tuple[Work, ...] = ()
    """Phases that follow each other."""
    detail: Callable[[], str] = lambda: ""


@dataclass
class Case:
    """Arms on one input; ``name`` says what for, ``truth`` what an arm must produce."""

    name: str
    scope: str
    """``"sublayer"``, ``"encoder"`` or ``"kernel"``."""
    direction: str
    model: str
    dtype: str
    batch: int
    length: int
    truth: Callable[[Key], Truth]
    arms: list[Arm] = field(default_factory=list)
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs
    rest: float = 0.0
    """Seconds in which nothing runs before an arm's turn: until threads of the arm before it no
    longer spin, where each has a pool of its own."""

    @property
    def title(self) -> str:
        kind = self.scope if self.name == self.scope else f"{self.scope}, {self.name}"
        return ", ".join(filter(None, (kind, self.dtype, f"{self.batch} x {self.length}")))

    @property
    def settles(self) -> bool:
        """Whether an untimed call of the same arm goes before each timed one: not where the work is
        far larger than any cache, and lasts far longer than an idle pool of threads spins."""
        return self.scope != "encoder" or self.batch * self.length <= SETTLED_TOKENS

    def row(self, arm: Arm) -> dict[str, Any]:
        """The arm's row in a result, without what is measured."""
        names = ("scope", "direction", "model", "dtype", "batch", "length")
        found = {"case": self.name, **{name: getattr(self, name) for name in names}}
        found["dtype"] = arm.key.dtype or self.dtype
        found |= {"padding": arm.key.padding, "tokens": arm.tokens}
        found |= {"arm": arm.key.arm, "k": arm.key.k, "bound": arm.bound}
        found["placements"] = list(arm.key.placements) if arm.key.k else []
        return found | {"status": "ok", "reason": "", "detail": "", "error": None, "allowed": None}
