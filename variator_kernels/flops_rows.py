"""The tokens of a batch as :mod:`.flops` counts them: which are merged, which keys are seen."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

from torch import Tensor

from .ops.flop_formulas import groups_around


class Rows:
    """Of an encoder: the lengths of rows, and the places of the tokens that stay whole."""

    def __init__(self, lengths: list[int], places: list[set[int]]) -> None:
        self.lengths = lengths
        self.places = places

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def whole(self, ratio: int) -> list[set[int]]:
        """The places of the tokens of each row that stay whole."""
        return self.places

    def merged(self, ratio: int) -> int:
        """Tokens that are members of groups."""
        return sum(self.lengths) - sum(map(len, self.whole(ratio)))

    def groups(self, ratio: int) -> list[int]:
        """Of each row."""
        return list(map(groups_around, self.lengths, repeat(ratio), self.whole(ratio)))

    def vectors(self, ratio: int) -> list[int]:
        """Merged ones and whole tokens of each row."""
        if ratio == 1:
            return self.lengths
        pairs = zip(self.groups(ratio), self.whole(ratio), strict=True)
        return [groups + len(whole) for groups, whole in pairs]

    def attention(self, around: int, front: int) -> tuple[int, int]:
        """The keys of a row, and its pairs of a query and a key, at the ratios of ``attention`` and
        of ``attention_kv``."""
        keys = max(self.vectors(max(around, front)), default=0)
        return keys, keys * (keys if around > 1 else self.longest)

    def merged_keys(self, ratio: int) -> int:
        """Tokens that become merged keys."""
        return self.merged(ratio)


class Prompts(Rows):
    """Of a decoder."""

    def __init__(self, lengths: list[int], places: list[set[int]], kept: int, window: int) -> None:
        super().__init__(lengths, places)
        self.kept, self.window = kept, window

    def whole(self, ratio: int) -> list[set[int]]:
        """With those behind a row's last group."""
        found = []
        for n, places in zip(self.lengths, self.places, strict=True):
            begin = max(places, default=-1) + 1
            rest = (n - begin) % ratio if n > 1 else n  # one token is a step of decoding
            found.append(places | set(range(n - rest, n)))
        return found

    def attention(self, around: int, front: int) -> tuple[int, int]:
        """A merged key is made beside the plain ones."""
        n = self.longest
        if front == 1:
            return n, n * (n + 1) // 2
        complete = max(0, n - self.kept) // front
        pairs = sum(range(1, min(n, self.kept) + 1))
        for s in range(n - self.kept):
            groups = min(max(0, s + 1 - self.window) // front, s // front)
            pairs += self.kept + groups + s + 1 - groups * front
        return n + complete, pairs

    def merged_keys(self, ratio: int) -> int:
        return sum(max(0, n - self.kept) // ratio * ratio for n in self.lengths)


def whole(lengths: list[int], first: int, last: int, kept: Tensor | None) -> list[set[int]]:
    """Of each row the positions of the tokens that stay whole.

    Raises:
        ValueError: ``kept`` is not of these rows.
    """
    places: Iterable[set[int]] = (
        {*range(min(first, n)), *range(max(n - last, 0), n)} for n in lengths
    )
    if kept is None:
        return list(places)
    shape = (len(lengths), max(lengths, default=0))
    if not isinstance(kept, Tensor) or tuple(kept.shape) != shape:
        got = list(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(f"kept must be a tensor of shape {list(shape)}, got {got}")
    further = [row.nonzero().flatten().tolist() for row in kept]
    return [
        ends | {at for at in more if at < n}
        for ends, more, n in zip(places, further, lengths, strict=True)
    ]
