"""Every number and switch of modules and configurations, edited: it counts or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.sites import zoo
from tests.sites.edited_cases import IDS, MASK, PLACES, patched
from variator_kernels.sites.find import find

CANNOT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What models themselves raise for numbers that they know nothing of."""
MATTER = {"t5": 4, "umt5": 4, "bert": 1, "bart": 1, "deberta-v2": 4, "layoutlmv3": 4}
"""How many edits change what a model computes, at least."""


def others(value: object) -> list:
    """What somebody may write in the place of ``value``."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    return [value / 2] if isinstance(value, float) else []


def numbers_of(model: nn.Module) -> dict[tuple[str, str], object]:
    """What modules and the configuration hold, by where (a class, or ``"config"``) and name."""
    found = {("config", name): value for name, value in model.config.to_dict().items()}
    found[("config", "is_causal")] = True
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in ("training", "layer_idx"):
                found[(type(module).__name__, name)] = value
    return found


def write(model: nn.Module, where: str, name: str, value: object) -> nn.Module:
    if where == "config":
        setattr(model.config, name, value)
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}  # a patched one is a subclass
        if where in kinds and name in vars(module):
            setattr(module, name, value)
    return model


def matters(wanted: torch.Tensor, before: torch.Tensor) -> bool:
    return wanted.shape == before.shape and bool((wanted - before).abs().max() > 1e-6)


@torch.no_grad()
def output(encoder: nn.Module, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states of the real tokens."""
    found = encoder(IDS, attention_mask=mask).last_hidden_state
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize("mask", [MASK, None], ids=["padding", "none"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(
    "family", [name for name in zoo.NAMES if zoo.family(name).attention is not None]
)
def test_of_an_encoder(family: str, late: bool, mask: torch.Tensor | None) -> None:
    """What changes the model changes the patched one, where all tokens stay whole; or patching, or
    the next forward, says what it does not know. Written before or behind patching."""
    if not zoo.installed(family):
        pytest.skip(f"this version of transformers has no {family}")

    def plain() -> tuple[nn.Module, nn.Module]:
        made = zoo.plain(family).double().requires_grad_(False)
        return made, find(made).encoder  # which a switch may hide

    before, counted = output(plain()[1], mask), 0
    for (where, name), value in numbers_of(plain()[0]).items():
        for other in others(value):
            model, encoder = plain()
            try:
                write(model, where, name, other)
                wanted = output(encoder, mask)
            except CANNOT:
                continue
            if not matters(wanted, before):
                continue
            counted += 1
            model, encoder = plain()
            try:
                if late:
                    patched(model)
                    output(encoder, mask)
                write(model, where, name, other)
                if not late:
                    patched(model)
                vk.set_ratio(model, PLACES)
                with vk.keep(model, torch.ones_like(MASK)):
                    got = output(encoder, mask)
            except ValueError as error:
                assert name in str(error), (where, name, other, str(error))
                continue
            same = torch.allclose(got, wanted, atol=1e-5, rtol=1e-4)
            assert same, f"{where}.{name}: {value} -> {other}"
    assert mask is not None or counted >= MATTER.get(family, 0)


@pytest.mark.parametrize("family", decoders.FAMILIES)
@torch.no_grad()
def test_of_a_decoder(family: str) -> None:
    """The same, written behind patching; prompts within the window of plain keys."""
    tokens = decoders.ids()
    before, counted = decoders.model(family)(tokens).logits, 0
    for (where, name), value in numbers_of(decoders.model(family)).items():
        for other in others(value):
            try:
                wanted = write(decoders.model(family), where, name, other)(tokens).logits
            except CANNOT:
                continue
            if not matters(wanted, before):
                continue
            counted += 1
            model = decoders.patched(family, {"attention_kv": 3}, window=64)
            model(tokens)
            try:
                got = write(model, where, name, other)(tokens).logits
            except ValueError as error:
                assert name in str(error), (where, name, other, str(error))
                continue
            same = torch.allclose(got, wanted, atol=1e-5, rtol=1e-4)
            assert same, f"{where}.{name}: {value} -> {other}"
    assert counted > 3


@pytest.mark.parametrize("placement", ["ffn", "attention_kv"])
@pytest.mark.parametrize("late", [False, True])
def test_a_decoder_that_sees_both_ways_is_refused(placement: str, late: bool) -> None:
    model = decoders.model("llama")
    if late:
        vk.patch(model, {placement: 3})
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"causal.*got.* is_causal=False"):
        model(decoders.ids()) if late else vk.patch(model, {placement: 3})
    if late:
        vk.unpatch(model)
    model(decoders.ids())


def test_names_that_no_model_of_the_family_reads_are_let_be() -> None:
    model = decoders.model("llama", use_bidirectional_attention=True)
    vk.patch(model, {"ffn": 2})


@pytest.mark.parametrize("placement", ["attention", "attention_kv"])
def test_deberta_without_terms_of_distance(placement: str) -> None:
    """Its default: then the encoder knows no buckets."""
    if not zoo.installed("deberta-v2"):
        pytest.skip("this version of transformers has no deberta-v2")
    model = zoo.plain("deberta-v2", relative_attention=False)
    with torch.no_grad():
        wanted = model(IDS, attention_mask=MASK).last_hidden_state
        vk.patch(model, {placement: 2})
        with vk.keep(model, torch.ones_like(MASK)):
            got = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(got[MASK.bool()], wanted[MASK.bool()], atol=1e-5, rtol=1e-4)
