"""What is compressed: by words for the places, a ratio and a window."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..harness import options

UNTRAINED = "untrained"
"""What plugins at their initial values are called, beside folders of trained ones."""


class Level(NamedTuple):
    """What is compressed: ``where`` in words, as ``attention_kv+ffn/2``; nothing is dense.

    ``ffn/2`` is the upper half of the layers, ``ffn/3`` the upper third.
    """

    where: str = ""
    k: int = 1
    window: int | None = None
    """Of plain keys; None where there is no ``attention_kv``."""

    def __str__(self) -> str:
        parts = [self.where or "hf-sdpa", f"k={self.k}" if self.where else ""]
        return " ".join(filter(None, [*parts, f"w={self.window}" if self.window else ""]))

    def ratio(self, layers: int) -> Any:
        """As ``vk.set_ratio`` takes it."""
        made: dict[str, dict[int, int]] = {}
        for part in self.where.split("+"):
            place, _, share = part.partition("/")
            made[place] = dict.fromkeys(range(layers - layers // int(share or 1), layers), self.k)
        return made

    def behind_prompt(self, layers: int) -> Any:
        """The same without FFNs, whose groups see the tokens behind them."""
        kept = {place: of for place, of in self.ratio(layers).items() if place != "ffn"}
        return kept or 1


def every(
    places: Iterable[str], ratios: Iterable[int], windows: Iterable[int],
    only: list[str] | None = None,
) -> list[Level]:  # fmt: skip
    """The dense one, then all combinations, or ``only`` those of these names; windows only where
    they matter. ``ValueError`` for a name that none has."""
    made = []
    for k in ratios:
        for where in places:
            own = windows if "attention_kv" in where else (None,)
            made += [Level(where, k, window) for window in own]
    if only is not None:
        if not only:
            raise ValueError("only must name at least one level, got none")
        options.check("only", only, list(map(str, made)), "some of")
    return [Level(), *(level for level in made if only is None or str(level) in only)]


def check_places(places: Iterable[str], layers: int) -> None:
    """``ValueError`` for words that name no places of a model."""
    for where in places:
        for part in where.split("+"):
            place, slash, share = part.partition("/")
            whole = place == "attention_kv" and not slash
            some = place == "ffn" and (not slash or (share.isdigit() and 0 < int(share) <= layers))
            if not whole and not some:
                raise ValueError(
                    f"places must be attention_kv, ffn or ffn/N (the upper Nth of {layers} "
                    f"layers), joined by +, got {where!r}"
                )
