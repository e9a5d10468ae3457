"""The public function: checks, what is restored afterwards, and the run in between."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .... import backends, checks
from ....ops import prepack
from ....ops.int8_linear import own_precision
from ....ops.prepacked_linear import FrozenProducts
from ....runtime.level import Level
from ....runtime.plan import Plan
from ....runtime.site import Site
from ....runtime.state import State
from ....sites.found import Found
from ....sites.in_place import patched
from ....sites.wrappers import check_values
from ..method import plugin_parameters
from .inputs import chunks
from .run import Run
from .sensitivity import output_of
from .streams import Blocks
from .table import Calibration


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    ratios: Iterable[Any] | None = None,
    *,
    merge: bool = True,
    adapter: bool = True,
    passes: int = 3,
    progress: bool = False,
) -> Calibration:
    """Give the plugins of a patched model initial values that fit these inputs.

    Values that raise the model's final error on held-out sequences are not taken. Memory holds the
    inputs themselves (token ids and masks) and the work of one chunk of 4096 tokens; temporary
    files (``TMPDIR``) hold 4 hidden states of every token, and one more for each of ``ratios``,
    padding between rows of similar length included; on the CPU kernels there are packed copies of
    the encoder's linear weights, which are freed at the end together with those that inference made
    of this model, and makes again. No other thread may use the model meanwhile.

    Args:
        model: patched. Its other parameters stay as they are.
        batches: arguments of the encoder, ``attention_mask`` among them, read once; a few hundred
            sequences of what it will be used on, or of plain text. About a fifth of them, at most
            4096 tokens, in runs of neighbours, is held out.
        ratios: which plugins; by default all, of each ratio behind those of the same one. A plan or
            a mapping, as :func:`set_ratio` takes it, stands for the plugins that it runs, and each
            is fitted behind the others of that level. No plugin may be named twice.
        merge, adapter: which parts, at least one; the other keeps its values.
        passes: of gradient descent at each site, over all tokens; 0: the closed form alone, which
            takes half the time. FFNs that pass no gradient (some quantised ones) have none.
        progress: show a bar, and print the table.

    Returns:
        The final error on held-out sequences before and after, per ratio and site.

    Raises:
        ValueError: the model is not patched, has no plugins for a ratio, or no values (on the
            meta device); two of ``ratios`` name the same plugin; or ``batches`` has fewer than 10
            sequences, or no ``attention_mask``.
            TypeError: ``batches`` does not hold mappings. FloatingPointError: the hidden states
            are not finite. OSError: no room for the temporary files. All plugins have their old
            values then.
    """
    found, state = patched_encoder(model, "calibrate")
    passes = checks.integer(passes, "passes")
    if not merge and not adapter:
        raise ValueError("merge and adapter must not both be False: nothing would be fitted")
    wanted = _levels(state, state.ratios if ratios is None else ratios)
    on_cpu = backends.resolve(state.method.config.backend, found.like(0)) == "cpu"
    given = chunks(batches, inspect.signature(found.encoder.forward).parameters, found.pads_to)
    with _restored(model, state):
        blocks = Blocks(model, found, state)
        products = FrozenProducts(found.encoder) if on_cpu else nullcontext()
        with products, own_precision(), blocks.installed():
            backend = "cpu" if on_cpu else "reference"
            output = output_of(model, found.encoder)
            with closing(Run(found, state, blocks, given, wanted, backend, output)) as run:
                table = run.all(merge, adapter, passes, progress)
    if progress:
        tqdm.write(str(table))
    return table


def patched_encoder(model: nn.Module, what: str) -> tuple[Found, State]:
    """The one encoder of ``model``, whose blocks ``what`` can run one at a time.

    Raises:
        ValueError: it is not patched, takes no ``attention_mask``, or has no values.
    """
    found, state = patched(model)
    if found.family.mask != "attention_mask":
        raise ValueError(
            f"{what} needs an encoder that takes attention_mask, the family of this one says "
            f"mask={found.family.mask!r}: give its forward such an argument"
        )
    check_values(found.encoder)
    return found, state


def _levels(state: State, ratios: Iterable[Any]) -> list[Level]:
    """Each once; the dense one is not among them.

    Raises:
        ValueError: the model lacks a plugin, or two of them name the same one.
    """
    found: dict[Level, Any] = {}
    for given in ratios:
        named_sites = isinstance(given, Plan | Level | Mapping)
        known = not named_sites and checks.ratio(given, "ratios") in (1, *state.ratios)
        level = state.everywhere(given) if known else state.check(given)
        if not level.is_dense:
            found.setdefault(level, given)
    named: dict[tuple[Site, int], Any] = {}
    for level, given in found.items():
        for site, k in zip(state.sites, level.ratios, strict=True):
            other = named.setdefault((site, k), given)
            if k > 1 and other is not given:
                raise ValueError(
                    f"ratios must name each plugin once, {site.placement} {site.layer} at ratio "
                    f"{k} is in two of them: calibrate them one after another"
                )
    return list(found)


@contextmanager
def evaluating(model: nn.Module, state: State) -> Iterator[None]:
    """In evaluation mode, without a warning of untrained plugins; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    warned, state.warned = state.warned, True
    try:
        model.eval()
        yield
    finally:
        state.warned = warned
        for module, training in modes:
            module.training = training


@contextmanager
def _restored(model: nn.Module, state: State) -> Iterator[None]:
    """Modes and caches afterwards as before; after an error the plugins too."""
    before = [(parameter, parameter.clone()) for parameter in plugin_parameters(model)]
    try:
        with evaluating(model, state):
            yield
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    finally:
        prepack.cache.forget(model.parameters())
