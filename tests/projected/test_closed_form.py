"""The start "pca": exact where nothing is lost, and the least squares that it says it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.projected import cases
from variator_kernels.methods.projected import regression
from variator_kernels.methods.projected.composition import composition_of
from variator_kernels.sites.layout import layout_of


def narrow_stream(name: str, size: int, untied: bool = True) -> nn.Module:
    """A random model whose stream lies in ``size`` dimensions, in no direction of the axes."""
    # The root mean square's epsilon weighs less where the same length is in fewer values.
    model = cases.model(name, **({} if name.startswith("t5") else {"rms_norm_eps": 1e-12}))
    layout = layout_of(model)
    if untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.randn_like(head.weight) * 0.1)
        layout = layout_of(model)
        assert not layout.tied
    d = getattr(model.config, layout.hidden_field)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    inside = basis[:, :size] @ basis[:, :size].mT
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ inside)
        for part in layout.sublayers:
            writes = model.get_submodule(part.writes)
            writes.weight.copy_(inside @ writes.weight * 3)
            if writes.bias is not None:
                writes.bias.copy_(inside @ writes.bias)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "t5-relu", "t5-gated-gelu"])
def test_exact_where_the_stream_is_no_wider(name, monkeypatch):
    """Gains, cross-attention, biases and constants come out right, whatever the basis."""
    model = narrow_stream(name, 16)
    monkeypatch.setattr(regression, "RIDGES", (1e-13,))
    given = [cases.batch(model, seed) for seed in range(6)]
    small = vk.project(model, given, hidden=16, start="pca")
    for inputs in (given[0], cases.batch(model, 9)):
        expected = cases.output(model, inputs)
        torch.testing.assert_close(cases.output(small, inputs), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.05
    assert getattr(small.config, layout_of(model).hidden_field) == 16


@pytest.mark.parametrize("name", ["llama", "t5-relu", "gemma"])
def test_less_is_lost_than_by_selection(name):
    model = narrow_stream(name, 16, untied=False)
    given = [cases.batch(model, seed) for seed in range(6)]
    inputs = cases.batch(model, 9)
    expected = cases.output(model, inputs)
    errors = {
        start: (cases.output(vk.project(model, given, hidden=16, start=start), inputs) - expected)
        .square()
        .mean()
        for start in ("select", "pca")
    }
    assert errors["pca"] < 0.7 * errors["select"]


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "t5-gated-gelu"])
def test_ffn_alone_is_least_squares(name, monkeypatch):
    """In the first FFN, whose input nothing has changed, against PyTorch's own solver."""
    monkeypatch.setattr(regression, "RIDGES", (1e-12,))
    model, layout = cases.model(name), layout_of(cases.model(name))
    given = [cases.batch(model, seed) for seed in range(4)]
    small = vk.project(model, given, ffn=20, start="pca")
    part = next(part for part in layout.sublayers if part.inner)
    first, last = (
        composition_of(small.get_submodule(part.reads[0])),
        small.get_submodule(part.writes),
    )
    kept = first.p_out.argmax(1)
    neurons = cases.reads(model, part.writes, given)
    truth = torch.linalg.lstsq(neurons[:, kept], neurons).solution.mT
    torch.testing.assert_close(composition_of(last).p_in, truth, rtol=1e-6, atol=1e-6)


def test_moments_are_least_squares(monkeypatch):
    monkeypatch.setattr(regression, "RIDGES", (1e-12,))
    x = torch.randn(50, 5, dtype=torch.float64)
    y = torch.randn(50, 7, dtype=torch.float64)
    moments = regression.Moments([(y[:20], x[:20]), (y[20:], x[20:])])
    found = moments.fitted(torch.randn(7, 5, dtype=torch.float64))
    truth = torch.linalg.lstsq(x, y).solution.mT
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    # Without a second dimension of x, the prior decides.
    x[:, 1] = x[:, 0]
    prior = torch.zeros(7, 5, dtype=torch.float64)
    prior[:, 0] = 1.0
    assert torch.isfinite(regression.Moments([(y, x)]).fitted(prior)).all()


@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_the_pull_is_what_other_tokens_want(noise, monkeypatch):
    """With little noise least squares, with much the prior: on new tokens near the best ridge."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prior, truth = normal(6, 40), normal(6, 40) * 0.3
    truth += prior
    # Four pairs of 30 for 40 unknowns a row.

    def drawn(count):
        x = normal(count, 40)
        return x @ truth.mT + noise * normal(count, 6), x

    pairs = [drawn(30) for _ in range(4)]
    y, x = drawn(20_000)

    def error(ridges):
        monkeypatch.setattr(regression, "RIDGES", ridges)
        return float((y - x @ regression.Moments(pairs).fitted(prior, False).mT).square().mean())

    tried = regression.RIDGES
    found, every = error(tried), [error((ridge,)) for ridge in tried]
    assert found <= 1.05 * min(every)
    if noise:
        assert min(every) < 0.95 * every[0]


def test_halves_hold_half_the_tokens_each():
    x = torch.randn(60, 3, dtype=torch.float64)
    for size in (1, 3, 60):
        moments = regression.Moments([(some, some) for some in x.split(size)])
        torch.testing.assert_close(moments.xx[0] + moments.xx[1], x.mT @ x)
        seen = [float(half.diagonal().sum()) for half in moments.xx]
        assert min(seen) > 0.25 * sum(seen)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ffn_alone(name, dtype):
    """The stream stays whole, so some matrices have no P, and the others' dtype is the model's."""
    model = cases.model(name).to(dtype)
    inner = model.config.intermediate_size // 2
    inputs = cases.batch(model)
    small = vk.project(model, [inputs], ffn=inner)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small(**inputs).logits.isfinite().all() and small.config.intermediate_size == inner
