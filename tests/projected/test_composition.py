"""W_C = P_out W P_in + A: its value, its gradients, and when it is built."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from variator_kernels.methods.projected import composition
from variator_kernels.methods.projected.composition import Composition, attach, collecting, send

OUT, IN, OUT_C, IN_C = 7, 6, 4, 3
SIDES = [(True, True), (True, False), (False, True), (False, False)]


def tensors(p_out: bool, p_in: bool):
    made = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=made, dtype=torch.float64)

    left, right = draw(OUT_C, OUT) if p_out else None, draw(IN, IN_C) if p_in else None
    return draw(OUT, IN), left, right, draw(OUT_C if p_out else OUT, IN_C if p_in else IN)


def layer(p_out: bool = True, p_in: bool = True, **settings) -> nn.Linear:
    frozen, left, right, addition = tensors(p_out, p_in)
    made = nn.Linear(addition.shape[1], addition.shape[0], bias=False, dtype=torch.float64)
    attach(made, Composition(frozen, right, left, **settings), addition)
    return made


def parameters(made: nn.Module) -> dict[str, torch.Tensor]:
    return dict(made.named_parameters())


@pytest.mark.parametrize("p_out, p_in", SIDES)
def test_value_and_gradcheck(p_out, p_in):
    frozen, left, right, addition = tensors(p_out, p_in)
    truth = frozen if left is None else left @ frozen
    truth = (truth if right is None else truth @ right) + addition
    torch.testing.assert_close(layer(p_out, p_in).weight, truth)
    inputs = [t if t is None else t.requires_grad_(True) for t in (left, right, addition)]

    def weight(*factors):
        built = composition.compose(frozen, *(f if f is None else f.detach() for f in factors))
        return composition._Compose.apply(built, frozen, *factors)

    assert torch.autograd.gradcheck(weight, inputs)


def test_gradients_are_those_of_the_specification():
    frozen, left, right, addition = tensors(True, True)
    made, x = layer(), torch.randn(5, IN_C, dtype=torch.float64)
    made(x).square().sum().backward()
    upstream = 2 * (x @ (left @ frozen @ right + addition).mT).mT @ x
    expected = (upstream, (left @ frozen).mT @ upstream, upstream @ (frozen @ right).mT)
    found = [p.grad for p in made.parameters()]
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("p_out, p_in", SIDES)
def test_micro_batches_equal_one_batch(p_out, p_in):
    x = torch.randn(8, IN_C if p_in else IN, dtype=torch.float64)
    whole, parts, collected = (layer(p_out, p_in) for _ in range(3))
    whole(x).square().sum().backward()
    for part in x.split(2):
        parts(part).square().sum().backward()
    with collecting(collected):
        for part in x.split(2):
            collected(part).square().sum().backward()
        assert all(p.grad is None for p in collected.parameters())
        send(collected)
    for name, truth in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name].grad, truth.grad)
        torch.testing.assert_close(parameters(collected)[name].grad, truth.grad)


def test_built_once_a_step(monkeypatch):
    built = []
    original = composition.compose
    monkeypatch.setattr(composition, "compose", lambda *a: built.append(1) or original(*a))
    made, x = layer(), torch.randn(2, IN_C, dtype=torch.float64)
    optimizer = torch.optim.AdamW(made.parameters())
    with collecting(made):
        for step in range(3):
            for _ in range(4):
                made(x).sum().backward()
            with torch.no_grad():
                made(x)
            send(made)
            assert len(built) == step + 1
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("foreach, fused", [(False, False), (True, False), (False, True)])
def test_evaluation_never_sees_an_old_weight(foreach, fused):
    made, x = layer(), torch.randn(2, IN_C, dtype=torch.float64)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, foreach=foreach, fused=fused)
    with torch.inference_mode():
        before = made(x).clone()
    made(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = made(x)
    part = composition.composition_of(made)
    truth = part.p_out @ part.frozen @ part.p_in + composition.addition_of(made)
    torch.testing.assert_close(after, x @ truth.mT)
    assert not torch.allclose(after, before)
    made.load_state_dict(layer().state_dict())
    torch.testing.assert_close(made(x), before)
    part.frozen.mul_(2)
    assert not torch.allclose(made(x), before)
    part.frozen.div_(2)
    made.eval()
    part.p_in.data.mul_(2)  # not counted: the next mode begins anew
    made.train()
    assert not torch.allclose(made(x), before)


class Descent(torch.optim.Optimizer):
    """Some optimizers write parameters, others their ``.data``, which nobody counts."""

    def __init__(self, parameters, data: bool):
        super().__init__(parameters, {})
        self.data = data

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            (p.data if self.data else p).sub_(p.grad, alpha=0.01)


@pytest.mark.parametrize("collects", [False, True])
def test_optimizers_that_write_data_train_alike(collects):
    x = torch.randn(4, IN_C, dtype=torch.float64)
    ends, losses = [], []
    for data in (False, True):
        made = copy.deepcopy(layer())  # as unpickled ones, it never ran __init__
        optimizer = Descent(made.parameters(), data)
        with collecting(made) if collects else nullcontext():
            for _ in range(3):
                loss = made(x).square().mean()
                loss.backward()
                send(made)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        ends.append(made.weight.detach())
    assert losses[:3] == losses[3:] and losses[2] < losses[1] < losses[0]
    assert torch.equal(*ends)


def test_steps_of_other_models_are_not_counted():
    made, x = layer(), torch.randn(2, IN_C, dtype=torch.float64)
    made(x)
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    optimizer = Descent(other.parameters(), True)
    versions = [p._version for p in other.parameters()]
    optimizer.step()
    assert [p._version for p in other.parameters()] == versions


def test_gradients_that_were_not_sent_are_an_error():
    made, x = layer(), torch.randn(2, IN_C, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not sent"), collecting(made):
        made(x).sum().backward()
    with pytest.raises(RuntimeError, match="not sent"), collecting(made):
        made(x).sum().backward()
        with torch.no_grad():
            composition.addition_of(made).add_(1)
        made(x)


def test_moves_copies_and_what_stays():
    made, staying = layer(), layer(stays=True)
    x = torch.randn(2, IN_C, dtype=torch.float64)
    truth = made(x).detach()
    torch.testing.assert_close(copy.deepcopy(made)(x), truth)
    assert composition.composition_of(made.float()).frozen.dtype == torch.float32
    part = composition.composition_of(staying.float())
    assert part.frozen.dtype == torch.float64
    torch.testing.assert_close(staying(x.float()), truth.float())


def test_a_shared_weight_is_one():
    first, second = nn.Embedding(5, 6, dtype=torch.float64), nn.Linear(6, 5, False).double()
    frozen, p_in = torch.randn(5, 9).double(), torch.randn(9, 6).double()
    attach(first, Composition(frozen, p_in), torch.zeros(5, 6).double())
    composition.share(second, first)
    assert len(list(nn.ModuleList([first, second]).parameters())) == 2
    both = nn.ModuleList([first, second])
    ids = torch.tensor([0, 3])
    with collecting(both):
        second(first(ids)).square().sum().backward()
        send(both)
    weight = (frozen @ p_in).requires_grad_(True)
    (weight[ids] @ weight.mT).square().sum().backward()
    torch.testing.assert_close(composition.addition_of(first).grad, weight.grad)
    torch.testing.assert_close(composition.composition_of(first).p_in.grad, frozen.mT @ weight.grad)
    torch.testing.assert_close(copy.deepcopy(both)[1].weight, second.weight)
