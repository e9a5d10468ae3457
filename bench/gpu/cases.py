"""What is measured, most wanted first: the report stops starting cases when its time is up."""

from __future__ import annotations

from typing import NamedTuple

DENSE, PLUGIN = ("hf", "hf-compiled"), ("reference", "reference-compiled", "ours")
EAGER = ("hf", "reference", "ours")
RATIOS = (2, 4, 8, 16, 32)
# What is compared with every other arm of its case: ``ours`` is Triton's.
OURS = ("ours", "cuda", "cuda-launches")


class Case(NamedTuple):
    """One table of the report: arms of one sublayer at one size."""

    name: str
    model: str
    batch: int
    length: int
    ratios: tuple[int, ...]
    arms: tuple[str, ...] = EAGER
    backward: bool = False

    @property
    def compiles(self) -> bool:
        """Whether an arm needs a compiler that tries out variants: a minute or more."""
        return any(arm.endswith("-compiled") for arm in self.arms)

    def with_cuda(self) -> Case:
        """With the CUDA kernels beside; few groups are one launch, so there in several too."""
        more = ("cuda", "cuda-launches") if self.name == "small" else ("cuda",)
        return self._replace(arms=(*self.arms, *more))


class Kernels(NamedTuple):
    """Each kernel alone, T5-base at k = 4."""

    batch: int
    length: int
    name: str = "kernels"
    model: str = "t5-base"
    compiles: bool = False


CASES = (
    Case("target", "t5-base", 32, 512, (4,), (*DENSE, *PLUGIN)),
    Case("curve", "t5-base", 32, 512, RATIOS),
    Case("backward", "t5-base", 32, 512, (4,), ("reference", "ours"), backward=True),
    Case("sizes", "t5-large", 32, 512, (4,)),
    Case("sizes", "llama-7b", 8, 2048, (2, 4)),
    Case("sizes", "bert-base", 32, 512, (4,)),
    Case("small", "t5-base", 1, 128, (4,)),
    Case("small", "t5-base", 1, 512, (4,)),
    Case("backward", "t5-base", 32, 512, (2, 8, 16, 32), ("reference", "ours"), backward=True),
    Case("target", "t5-large", 32, 512, (4,), (*DENSE, *PLUGIN)),
    Case("target", "llama-7b", 8, 2048, (4,), (*DENSE, *PLUGIN)),
    Case("target", "bert-base", 32, 512, (4,), (*DENSE, *PLUGIN)),
    Case("target", "llama-7b", 8, 2048, (2,), (*DENSE, *PLUGIN)),
)
# In the order in which they are measured: what takes a minute a case comes last.
JOBS: tuple[Case | Kernels, ...] = (
    CASES[0],
    *(case for case in CASES[1:] if not case.compiles),
    Kernels(32, 512),
    Kernels(1, 512),
    *(case for case in CASES[1:] if case.compiles),
)


class Target(NamedTuple):
    """A bound on a ratio within one case: ``of`` against an arm, or over the floor."""

    what: str
    case: str
    arm: str
    limit: float
    at_least: bool = True
    of: str = "ours"


TARGETS = (
    Target("against Hugging Face's sublayer, eager", "target", "hf", 3.5),
    Target("against the dense sublayer, max-autotune", "target", "hf-compiled", 2.5),
    Target("against the eager reference", "target", "reference", 2.2),
    Target("against the reference, max-autotune", "target", "reference-compiled", 1.5),
    Target("time over the floor", "target", "floor", 1.4, at_least=False),
    Target("forward and backward against the eager reference", "backward", "reference", 1.5),
    Target("peak memory of forward and backward, of the reference's", "backward", "memory", 1.0,
           at_least=False),
    Target("CUDA, against the dense sublayer, max-autotune", "target", "hf-compiled", 2.8,
           of="cuda"),
    Target("CUDA, time over the floor", "target", "floor", 1.25, at_least=False, of="cuda"),
    Target("CUDA, one launch against several", "small", "cuda-launches", 1.5, of="cuda"),
)  # fmt: skip
