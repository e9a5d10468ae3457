"""Gradient descent at one site: what it leaves alone, on which inputs, at which scale.

That it lowers what the closed form leaves: test_calibration.py.
"""

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.methods.test_calibration import batches, few_steps, loss, model  # noqa: F401
from tests.ops.cases import needs_cpu
from tests.sites import tiny
from variator_kernels.methods.variator.calibration import descent, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:plugins are untrained")


@pytest.mark.parametrize("part", ["merge", "adapter"])
def test_moves_the_chosen_part_alone(part, few_steps):  # noqa: F811
    made = model("bert", "gelu")
    before = {name: p.clone() for name, p in made.named_parameters() if ".plugins." in name}
    vk.calibrate(made, batches(), [2], merge=part == "merge", adapter=part == "adapter")
    after = dict(made.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all(f".plugins.2.{part}." in name for name in moved)


@needs_cpu
@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
def test_kernels_and_reference_go_the_same_way(family):
    found = []
    for backend in ("cpu", "reference"):
        made = model(family, {"t5": "relu"}.get(family, "gelu"), backend=backend)
        vk.calibrate(made, batches(left=True), [2])
        found.append(loss(made, 2))
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("scale", [0.1, 1e3])  # less, and the norms' epsilon shows
def test_the_models_scale_does_not_matter(scale):
    """A T5 whose FFNs and residual stream are larger or smaller alike loses the same share."""
    shares = []
    for factor in (1.0, scale):
        made = model("t5", "relu")
        with torch.no_grad():
            made.get_input_embeddings().weight.mul_(factor)
            for name, parameter in made.named_parameters():
                if name.endswith(("wo.weight", "o.weight")) and ".plugins." not in name:
                    parameter.mul_(factor)
                if name.endswith("final_layer_norm.weight"):
                    parameter.fill_(1.0)
        before = loss(made, 2)
        vk.calibrate(made, batches(), [2])
        shares.append(loss(made, 2) / before)
    assert shares[0] == pytest.approx(shares[1], rel=0.2)


class Rounded(nn.Linear):
    """No gradient passes it, as with some quantised layers."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_an_ffn_that_passes_no_gradient_keeps_the_closed_form():
    made = tiny.model("bert", "gelu")
    for layer in tiny.layers(made):
        old = layer.output.dense
        layer.output.dense = Rounded(old.in_features, old.out_features)
        layer.output.dense.load_state_dict(old.state_dict())
    vk.patch(made, 2, (2, 4), bottleneck=12)
    before = {k: loss(made, k) for k in (2, 4)}
    vk.calibrate(made, batches())
    assert all(loss(made, k) < 0.9 * value for k, value in before.items())


def test_without_passes_it_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(run, "descend", None)
    made = model("bert", "gelu")
    before = loss(made, 2)
    vk.calibrate(made, batches(), [2], passes=0)
    assert loss(made, 2) < before


@pytest.mark.parametrize("passes", [-1, 1.5, True, None])
def test_a_wrong_number_of_passes_is_refused(passes):
    made = model()
    before = [p.clone() for p in vk.plugin_parameters(made)]
    with pytest.raises(ValueError, match="passes must be"):
        vk.calibrate(made, batches(), passes=passes)
    for parameter, value in zip(vk.plugin_parameters(made), before, strict=True):
        assert torch.equal(parameter, value)


def test_nothing_is_recorded_and_base_weights_have_no_gradient(few_steps):  # noqa: F811
    made = model("bert", "gelu")
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    vk.calibrate(made, batches(), [2])
    assert all(p.grad is None and p.requires_grad for p in made.parameters())
    assert all(p.grad_fn is None for p in vk.plugin_parameters(made))


def test_steps_see_rows_of_a_chunk_with_their_own_groups(monkeypatch):
    """Slices of a chunk give the loss of the whole."""
    seen, real = [], descent._loss

    def record(rows, *more):
        seen.append((rows, more))
        return real(rows, *more)

    monkeypatch.setattr(descent, "_loss", record)
    monkeypatch.setattr(descent, "TOKENS", 64)
    made = tiny.patched("bert", "gelu", keep_first=1, keep=(5,), backend="reference")
    vk.calibrate(made, batches(left=True), [2])
    slices = [rows for rows, _ in seen]
    assert len({len(rows.x) for rows in slices}) > 1 or len(slices) > 100
    for rows, more in seen[:40]:
        parts = [descent._rows(rows, i, i + 1) for i in range(len(rows.x))]
        whole = real(rows, *more)
        weights = [float(part.weight.sum()) for part in parts]
        alone = [real(part, *more).item() for part in parts]
        mean = sum(w * a for w, a in zip(weights, alone, strict=True)) / sum(weights)
        assert mean == pytest.approx(whole.item(), rel=1e-4)
