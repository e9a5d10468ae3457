"""What a self-attention sublayer consists of: its norm, its four products, its residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import checks
from ..arguments import NO_NORM, Norm
from ..feed_forward import NORMS

Project = Callable[[Tensor], Tensor]


class Projections(NamedTuple):
    """What runs in place of the four products, where the weights alone do not tell what they do
    (replaced linear layers, LoRA, hooks): ``[..., d]`` to ``[..., H * head_size]``, and back."""

    q: Project
    k: Project
    v: Project
    o: Project


class OfDistances(NamedTuple):
    """The products of vectors of distances, ``[W, d]`` to ``[W, H * size]``, whose products with
    queries and keys are terms of the scores (DeBERTa)."""

    keys: Project | None
    """What queries meet (content to position); None: no such term."""
    queries: Project | None
    """What keys meet (position to content)."""
    dropout: float = 0.0
    """Of the vectors; 0 outside training."""


class GlobalKeys(NamedTuple):
    """A key for each block of a row's tokens: the sum of what the products see of them, normed by
    the root mean square (LongT5's transient-global attention, arXiv 2112.07916, section 3.1.2)."""

    weight: Tensor
    """Of the norm, ``[d]``."""
    eps: float
    size: int
    """Tokens of a block."""


class SelfAttention(NamedTuple):
    """The frozen sublayer around whose keys and values, or around which, a plugin works.

    ``w_o · softmax(scale · q·k + terms of positions) · v + b_o`` with ``q = w_q · h + b_q`` and so
    on. Shapes: ``w_q [H * head_size, d]``; ``w_k``, ``w_v`` ``[H_kv * head_size, d]``; ``w_o
    [d, H * head_size]``. ``norm`` is applied to the input (pre-norm), or to the sum ``x + o`` if
    ``post_norm`` is set.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    head_size: int
    scale: float
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    b_v: Tensor | None = None
    b_o: Tensor | None = None
    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6
    post_norm: bool = False
    residual: bool = True
    """Whether the sublayer adds its input. Without, it gives ``o`` alone, and 0 for padding."""
    dropout_weights: float = 0.0
    """Dropout probability of attention's weights; 0 outside training."""
    dropout_outer: float = 0.0
    """Dropout probability on ``o``; 0 outside training."""
    pack: bool = True
    """Whether the CPU may keep packed copies of the weights from call to call."""
    precision: str | None = None
    """In which the CPU multiplies where no gradient is asked for; None: in the weights' dtype."""
    modules: Projections | None = None
    q_norm: Project | None = None
    """Of queries ``[B, n, H, head_size]``, before rotations; ``k_norm`` of keys."""
    k_norm: Project | None = None
    window: tuple[int, int] | None = None
    """A token is seen from so many before to so many behind a query; None: from everywhere."""
    of_distances: OfDistances | None = None
    global_keys: GlobalKeys | None = None

    @property
    def any_norm(self) -> Norm:
        """The sublayer's norm, in front or behind."""
        return Norm(self.norm, self.norm_weight, self.norm_bias, self.eps)

    @property
    def pre_norm(self) -> Norm:
        """The norm in front of the products, if there is one."""
        return NO_NORM if self.post_norm or self.norm == "none" else self.any_norm

    def check(self, x: Tensor) -> None:
        """Every tensor fits ``x [B, n, d]``.

        Raises:
            ValueError: a shape, device or dtype does not; the message names it.
        """
        d = x.shape[-1]
        checks.choice(self.norm, NORMS, "norm")
        expected: dict[str, tuple[int, ...]] = {"norm_weight": (d,), "norm_bias": (d,)}
        if self.modules is None:
            queries, keys = self.w_q.shape[0], self.w_k.shape[0]
            for outputs, name in ((queries, "w_q"), (keys, "w_k")):
                if self.head_size < 1 or outputs % self.head_size:
                    raise ValueError(
                        f"{name} must have whole heads of {self.head_size} rows, got {outputs} rows"
                    )
            expected |= {"w_q": (queries, d), "w_k": (keys, d), "w_v": (keys, d)}
            expected |= {"b_q": (queries,), "b_k": (keys,), "b_v": (keys,)}
            expected |= {"w_o": (d, queries), "b_o": (d,)}
        given = {name: getattr(self, name) for name in expected}
        if self.global_keys is not None:
            expected["global_keys.weight"] = (d,)
            given["global_keys.weight"] = self.global_keys.weight
        for name, size in expected.items():
            tensor = given[name]
            if tensor is not None:
                checks.shape(tensor, size, name)
                checks.same_device(tensor, x, name)
                checks.floating(tensor, name)
