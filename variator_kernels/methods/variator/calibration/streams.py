"""Running an encoder block by block, with the hidden states between two blocks in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....runtime.levels import use_ratio
from ....runtime.state import State, observe
from ....sites.found import Found

AtSite = Callable[[nn.Module, Tensor], None]


class Store:
    """A tensor a chunk, in a temporary file: memory does not grow with their number."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._places: dict[int, tuple[int, torch.Size, torch.dtype, torch.device]] = {}
        self._end = 0

    def __setitem__(self, chunk: int, x: Tensor) -> None:
        """All tensors of a chunk have one size."""
        if chunk not in self._places:
            self._places[chunk] = self._end, x.shape, x.dtype, x.device
            self._end += x.numel() * x.element_size()
        self._file.seek(self._places[chunk][0])
        left = _bytes(x.detach().cpu().contiguous())
        while left:
            left = left[self._file.write(left) :]

    def __getitem__(self, chunk: int) -> Tensor:
        place, shape, dtype, device = self._places[chunk]
        x = torch.empty(shape, dtype=dtype)
        left = _bytes(x)
        self._file.seek(place)
        while left:
            read = self._file.readinto(left)
            if not read:
                raise OSError("the temporary file of hidden states ends early")
            left = left[read:]
        return x.to(device)

    def close(self) -> None:
        self._file.close()


class _Stop(Exception):
    """The last block that was asked for is done."""


class Blocks:
    """Runs some of an encoder's blocks, inside its own forward: it alone knows their arguments.

    Inside :meth:`installed` the blocks' ``forward`` is replaced, as packed products are.
    """

    def __init__(self, model: nn.Module, found: Found, state: State) -> None:
        self.model, self.encoder, self.state = model, found.encoder, state
        self.blocks, self.count = found.blocks, len(found.blocks)
        self._begin, self._end = 0, self.count
        self._hidden: Tensor | None = None
        self._number = 0
        self._last: Any = None
        self._plain = True
        self._extras: bool | None = None
        self._rest: tuple[Any, ...] = ()

    @contextmanager
    def installed(self) -> Iterator[None]:
        mine = []
        try:
            for block in {id(block): block for block in self.blocks}.values():
                mine.append((block, vars(block).get("forward")))
                vars(block)["forward"] = self._forward(block)
            yield
        finally:
            for block, before in mine:
                if before is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = before

    def run(
        self,
        inputs: dict[str, Tensor],
        level: Any,
        begin: int = 0,
        end: int | None = None,
        hidden: Tensor | None = None,
        at_site: AtSite | None = None,
        placement: str = "ffn",
    ) -> Tensor:
        """Blocks ``begin`` to ``end - 1`` on ``hidden``, the input of the first.

        Returns what the last of them gives; of all blocks, the encoder's last hidden state.
        """
        end = self.count if end is None else end
        self._begin, self._end, self._hidden = begin, end, hidden
        self._number, self._last = 0, None

        def observer(layer: nn.Module, x: Tensor, mask: Tensor | None, ratio: int) -> None:
            if at_site is not None and self._number - 1 >= begin:
                at_site(layer, x)

        try:
            with observe(self.state, observer, placement), use_ratio(self.model, level):
                output = self.encoder(**inputs)
        except _Stop:
            return _first(self._last)
        finally:
            self._hidden = None
        if isinstance(output, Tensor):
            return output
        return output[0] if isinstance(output, tuple) else output.last_hidden_state

    def at(
        self,
        inputs: dict[str, Tensor],
        level: Any,
        block: int,
        hidden: Tensor | None,
        placement: str = "ffn",
    ) -> Any:
        """The input of the block's sublayer, with the context of that forward."""
        got: list[Any] = []

        def at_site(layer: nn.Module, x: Tensor) -> None:
            got.extend((x, self.state.local.context))
            self._last = x
            raise _Stop

        self.run(inputs, level, block, block + 1, hidden, at_site, placement)
        return got

    def _forward(self, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            number = self._number
            self._number += 1
            skipped = number < self._begin and self._hidden is not None
            # A T5's first block makes the position bias that the others get: it always runs.
            if skipped and (number > 0 or self._extras is False):
                if self._last is None or isinstance(self._last, Tensor):
                    self._last = self._hidden if self._plain else (self._hidden, *self._rest)
            else:
                self._last = type(block).forward(block, *args, **kwargs)
                if self._extras is None:
                    self._plain = isinstance(self._last, Tensor)
                    self._rest = () if self._plain else tuple(self._last[1:])
                    self._extras = any(x is not None for x in self._rest)
            if skipped:
                if isinstance(self._last, tuple):
                    self._last = (self._hidden, *self._last[1:])
                else:
                    self._last = self._hidden
            if number + 1 == self._end < self.count:
                raise _Stop
            return self._last

        return forward


def _bytes(x: Tensor) -> memoryview:
    flat: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(module: nn.Module | None, into: list[Tensor]) -> Iterator[None]:
    """What a module gives, also where a block runs it again."""
    if module is None:
        yield
        return

    def see(module: nn.Module, args: Any, given: Any) -> None:
        into.append(given[0] if isinstance(given, tuple) else given)

    hook = module.register_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()
