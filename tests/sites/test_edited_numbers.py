"""Every number and switch of modules and configurations, edited: it counts or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.decoders import tiny as decoders
from tests.sites import zoo
from tests.sites.edited_cases import MASK, PLACES, hidden, patched


def others(value: object) -> list:
    """What somebody may write in the place of ``value``."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    return [value / 2] if isinstance(value, float) else []


@pytest.mark.parametrize("late", [False, True], ids=["before patching", "behind it"])
@pytest.mark.parametrize(
    "family", [name for name in zoo.NAMES if zoo.family(name).attention is not None]
)
def test_every_number_of_every_module_counts_or_is_refused(family: str, late: bool) -> None:
    """Numbers and switches that change what the model computes change what it computes patched,
    where all tokens stay whole; or patching, or the next forward, says what it does not know."""
    if not zoo.installed(family):
        pytest.skip(f"this version of transformers has no {family}")

    def plain() -> nn.Module:
        return zoo.plain(family).double().requires_grad_(False)

    def with_number(model: nn.Module, kind: type, name: str, value: object) -> nn.Module:
        for module in model.modules():
            if type(module).__mro__[-len(kind.__mro__) :] == kind.__mro__ and name in vars(module):
                setattr(module, name, value)
        return model

    before, counted = hidden(plain()), 0
    numbers = {
        (type(module), name): value
        for module in plain().modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }
    for (kind, name), value in numbers.items():
        for other in others(value):
            try:
                wanted = hidden(with_number(plain(), kind, name, other))
            except (
                RuntimeError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                ArithmeticError,
            ):
                continue  # the model itself knows nothing of it
            if wanted.shape != before.shape or (wanted - before).abs().max() < 1e-6:
                continue
            counted += 1
            try:
                if late:
                    model = patched(plain())
                    hidden(model)
                    with_number(model, kind, name, other)
                else:
                    model = patched(with_number(plain(), kind, name, other))
                vk.set_ratio(model, PLACES)
                with vk.keep(model, torch.ones_like(MASK)):
                    got = hidden(model)
            except (ValueError, TypeError) as error:
                assert name in str(error) or "attention" in str(error), (kind, name, other)
                continue
            same = torch.allclose(got, wanted, atol=1e-5, rtol=1e-4)
            assert same, f"{kind.__name__}.{name}: {value} -> {other}"
    if family in ("t5", "umt5", "deberta-v2", "layoutlmv3"):  # of others none may matter
        assert counted > 0


def with_numbers_of(model: nn.Module) -> dict:
    """What a decoder's modules and its configuration hold, as pairs of where and name."""
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
        if type(module).__name__ == where and name in vars(module):
            setattr(module, name, value)
    return model


@pytest.mark.parametrize("family", decoders.FAMILIES)
@torch.no_grad()
def test_every_number_of_a_decoder_counts_or_is_refused(family: str) -> None:
    """As above, written behind patching; prompts within the window of plain keys."""
    tokens = decoders.ids()
    before, counted = decoders.model(family)(tokens).logits, 0
    for (where, name), value in with_numbers_of(decoders.model(family)).items():
        for other in others(value):
            try:
                wanted = write(decoders.model(family), where, name, other)(tokens).logits
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
                continue
            if wanted.shape != before.shape or (wanted - before).abs().max() < 1e-6:
                continue
            counted += 1
            model = decoders.patched(family, {"attention_kv": 3}, window=64)
            model(tokens)
            try:
                got = write(model, where, name, other)(tokens).logits
            except ValueError as error:
                assert name in str(error) or "past_key_values" in str(error), (where, name, other)
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
    vk.unpatch(model) if late else None
    model(decoders.ids())
