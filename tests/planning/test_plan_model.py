"""vk.plan: close to the best plan there is, never behind uniform ratios, nothing left behind."""

import inspect
import itertools
import math
import random

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.methods.variator.calibration.inputs import whole
from variator_kernels.planning import costs, losses
from variator_kernels.planning.options import Options
from variator_kernels.runtime.level import Level
from variator_kernels.runtime.state import states

pytestmark = pytest.mark.filterwarnings("ignore:plugins are untrained")


def model(family="bert", act="gelu", placements=("ffn", "attention_kv"), **settings):
    made = tiny.model(family, act, **settings)
    vk.patch(made, 2, (2, 4), 6, placements=placements)
    tiny.train_plugins(made, 0.2)
    return made


def batches(number=1):
    made = []
    for seed in range(number):
        ids, mask = tiny.batch(23, 9, 17, seed=seed)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@torch.no_grad()
def loss(made, level):
    """In plain words."""
    squared = total = 0.0
    for batch in batches():
        real = batch["attention_mask"] != 0
        with vk.use_ratio(made, 1):
            dense = tiny.encode(made, batch["input_ids"], batch["attention_mask"])[real].double()
        with vk.use_ratio(made, level):
            got = tiny.encode(made, batch["input_ids"], batch["attention_mask"])[real].double()
        squared += float((got - dense).square().sum())
        total += float(dense.square().sum())
    return squared / total


def cost(made, level):
    counts = [
        vk.flops.count(made, length=batch["attention_mask"].sum(1).tolist(), ratio=level)
        for batch in batches()
    ]
    dense = sum(count.dense_multiply_adds.total for count in counts)
    return sum(count.multiply_adds.total for count in counts) / dense


def everything(made):
    """Every level with its cost and its loss."""
    levels = map(Level, itertools.product((1, 2, 4), repeat=len(states(made)[0].sites)))
    return [(cost(made, level), loss(made, level)) for level in levels]


CASES = [("bert", "gelu", ("ffn", "attention_kv"), 2), ("t5", "relu", ("ffn",), 3)]


@pytest.mark.parametrize(("family", "act", "placements", "layers"), CASES)
def test_close_to_the_best_there_is(family, act, placements, layers):
    made = model(family, act, placements, num_layers=layers)
    every = everything(made)
    least = min(cost for cost, _ in every)
    for limit in (least, 0.7 * least + 0.3, 0.4 * least + 0.6, 1.0):
        plan = vk.plan(made, batches(), cost=limit, measure="flops")
        assert plan.cost == pytest.approx(cost(made, plan))
        assert plan.predicted_cost == pytest.approx(plan.cost)
        assert plan.loss == pytest.approx(loss(made, plan), rel=1e-4, abs=1e-9)
        assert plan.cost <= limit + 1e-9
        best = min(loss for cost, loss in every if cost <= limit + 1e-9)
        assert plan.loss <= 1.03 * best + 1e-9
        for k in (1, 2, 4):
            if cost(made, k) <= limit:
                assert plan.loss <= loss(made, k) * (1 + 1e-4)
    for limit in sorted(loss for _, loss in every)[:: len(every) // 3]:
        plan = vk.plan(made, batches(), loss=limit * 1.001, measure="flops")
        assert plan.loss <= limit * 1.001
        assert plan.cost <= 1.03 * min(c for c, x in every if x <= limit * 1.001)


def test_is_deterministic_and_takes_speedups():
    made = model()
    plans = [vk.plan(made, batches(), cost=0.75, measure="flops") for _ in range(2)]
    assert plans[0] == plans[1]
    fast = vk.plan(made, batches(), speedup=1 / 0.75, measure="flops")
    assert (fast.asked, fast.ratios) == ("speedup", plans[0].ratios)
    assert fast.limit == pytest.approx(4 / 3)


class Clock:
    """Time that passes as blocks begin: for their sites, and for ratios that differ."""

    def __init__(self, made, mixed):
        self.now, self.state, self.mixed = 0.0, states(made)[0], mixed
        for i, layer in enumerate(made.encoder.layer):
            layer.register_forward_pre_hook(lambda *_, i=i: self.begin(i))

    def begin(self, layer):
        ratios = self.state.current().ratios
        pairs = zip(self.state.sites, ratios, strict=True)
        self.now += sum(1 / k for site, k in pairs if site.layer == layer)
        self.now += self.mixed * len(set(ratios)) / 2

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("mixed", [0.0, 1.0])
def test_given_times(mixed, monkeypatch):
    """Where a mixed level costs more than its sites do, the plan is corrected by measured cost."""
    made = model()
    monkeypatch.setattr(costs, "time", Clock(made, mixed))
    plans = [vk.plan(made, batches(), cost=limit) for limit in (0.7, 0.7, 0.9)]
    assert plans[0] == plans[1] and plans[0].measure == "time"
    for plan in plans:
        assert plan.cost <= plan.limit + 1e-9
        taken = sum(1 / k for k in plan.ratios) + mixed * len(set(plan.ratios))
        assert plan.cost == pytest.approx(taken / (4 + mixed))
        assert plan.loss <= loss(made, 2) * (1 + 1e-4)  # which costs 0.5 and 0.6
    least = (1 + mixed) / (4 + mixed)
    least = math.ceil(least * 1e4 - 1e-6) / 1e4
    message = rf"cost=0.01 cannot be reached: cost must be at least {least:.4f} .* by time"
    with pytest.raises(ValueError, match=message):
        vk.plan(made, batches(), cost=0.01)


def test_real_times():
    made = model()
    plan = vk.plan(made, batches(), loss=1.0)
    assert plan.measure == "time" and 0 < plan.cost <= 1 and plan.loss <= 1.0


def test_names_the_least_cost():
    made = model()
    least = cost(made, 4)
    said, most = math.ceil(least * 1e4) / 1e4, math.floor(1000 / least) / 1000
    message = rf"speedup=.* cannot be .* at least {said:.4f} .*at most {most:.3f}.*by flops"
    with pytest.raises(ValueError, match=message):
        vk.plan(made, batches(), speedup=1 / (0.9 * least), measure="flops")
    assert vk.plan(made, batches(), cost=said, measure="flops").ratios == (4,) * 4


def test_shared_modules_have_one_ratio():
    made = tiny.model("bert", "gelu", num_layers=3)
    made.encoder.layer[1] = made.encoder.layer[0]
    vk.patch(made, 2, (2, 4), 6)
    tiny.train_plugins(made, 0.2)
    for limit in (0.87, 0.93, 0.97):
        plan = vk.plan(made, batches(), cost=limit, measure="flops")
        assert plan.ratios[0] == plan.ratios[1]
        assert plan.loss == pytest.approx(loss(made, plan), rel=1e-4)
        vk.set_ratio(made, plan)


def test_padding_and_kept_tokens_count():
    """On the left, whole columns without tokens, a row without any, and ids that stay whole."""
    made = tiny.model("bert", "gelu")
    vk.patch(made, 2, (2, 4), 6, keep=[7, 8])
    ids, mask = tiny.batch(20, 0, 9, left=True, width=26)
    given = [{"input_ids": ids, "attention_mask": mask}]
    kept = torch.zeros(3, 20, dtype=torch.bool)
    for row, (tokens, real) in enumerate(zip(ids, mask != 0, strict=True)):
        here = tokens[real]
        kept[row, : len(here)] = (here == 7) | (here == 8)
    plan = vk.plan(made, given, cost=0.93, measure="flops")
    count = vk.flops.count(made, length=[20, 0, 9], ratio=plan, kept=kept)
    assert kept.any() and plan.cost == pytest.approx(count.fraction_left)


def test_decoders():
    from tests.decoders import tiny as decoders

    made = decoders.model("llama")
    vk.patch(made, {"ffn": 2, "attention_kv": 2}, ratios=(2, 4), bottleneck=2, window=4)
    plan = vk.plan(made, batches(), cost=0.9, measure="flops")
    assert plan.cost <= 0.9 and plan.loss > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaves_nothing_behind(error, monkeypatch):
    made = model()
    made.train()
    made.encoder.layer[1].eval()
    vk.set_ratio(made, 4)
    before = tiny.snapshot(made), [module.training for module in made.modules()]
    values = {name: tensor.clone() for name, tensor in made.state_dict().items()}

    def same():
        assert (tiny.snapshot(made), [module.training for module in made.modules()]) == before
        assert all(torch.equal(values[name], x) for name, x in made.state_dict().items())
        assert states(made)[0].level.uniform == 4 and not states(made)[0].warned
        assert torch.is_grad_enabled() and all(p.requires_grad for p in made.parameters())

    with vk.use_ratio(made, 2):
        vk.plan(made, batches(), cost=0.9, measure="flops")
        assert states(made)[0].current().uniform == 2
    same()
    calls = itertools.count()

    def fail(*_):
        if next(calls) == 11:
            raise error("stop")

    hook = made.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        vk.plan(made, batches(), cost=0.9, measure="flops")
    hook.remove()
    same()


REFUSED = [
    ({}, "exactly one of speedup, cost and loss, got none"),
    ({"cost": 0.5, "loss": 0.1}, "exactly one of speedup, cost and loss, got {'cost'"),
    ({"cost": 0}, "cost must be a share of the dense encoder's, 0 to 1, got 0"),
    ({"cost": 1.5}, "got 1.5"),
    ({"cost": float("nan")}, "got nan"),
    ({"cost": True}, "cost must be a number, got True"),
    ({"cost": "half"}, "cost must be a number, got 'half'"),
    ({"speedup": 0.5}, "speedup must be a finite number >= 1, got 0.5"),
    ({"loss": -0.1}, "loss must be a finite number >= 0, got -0.1"),
    ({"loss": float("inf")}, "loss must be a finite number >= 0, got inf"),
    ({"cost": 0.5, "measure": "energy"}, "measure must be one of"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_refuses(asked, message):
    with pytest.raises(ValueError, match=message):
        vk.plan(model(), batches(), **asked)


def test_refuses_models_and_batches():
    made = model()
    with pytest.raises(ValueError, match="model is not patched"):
        vk.plan(tiny.model("bert", "gelu"), batches(), cost=0.5)
    with pytest.raises(TypeError, match="batches must be several mappings"):
        vk.plan(made, batches()[0], cost=0.5)
    with pytest.raises(ValueError, match="batches must hold attention_mask"):
        vk.plan(made, [{"input_ids": batches()[0]["input_ids"]}], cost=0.5)
    with pytest.raises(ValueError, match="batches must hold at least one token"):
        vk.plan(made, [], cost=0.5)
    with torch.no_grad():
        made.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="last hidden state is not finite"):
        vk.plan(made, batches(), cost=0.5)


def test_plugins_that_are_not_finite_are_never_chosen():
    made = model(placements=("ffn",))
    with torch.no_grad():
        made.encoder.layer[0].plugins["4"].adapter.b2.fill_(float("nan"))
    plan = vk.plan(made, batches(), cost=0.93, measure="flops")
    assert plan.ratios[0] < 4 and plan.loss < 1


def test_shows_a_bar(capsys):
    vk.plan(model(placements=("ffn",)), batches(), cost=0.9, measure="flops", progress=True)
    assert "level" in capsys.readouterr().err


def test_where_nothing_fits_when_it_is_measured_nothing_is_chosen():
    made = model("t5", "relu", ("ffn",), num_layers=2)
    limit = cost(made, 4)
    for name, parameter in made.named_parameters():
        if name.endswith("adapter.b2"):
            parameter.data.fill_(2e38)  # each alone is finite, together they are not
    with pytest.raises(ValueError, match=r"cost=.* cannot be reached: cost must be at"):
        vk.plan(made, batches(), cost=limit, measure="flops")


def test_a_second_measurement_takes_nothing_back(monkeypatch):
    calls = []

    class Drifting(costs.MultiplyAdds):
        def of(self, choices):
            calls.append(1)
            return {c: v * (1.004 if len(calls) > 1 else 1) for c, v in super().of(choices).items()}

    made = model("t5", "relu", ("ffn",), num_layers=2)
    monkeypatch.setattr("variator_kernels.planning.plan_model.MultiplyAdds", Drifting)
    plan = vk.plan(made, batches(), cost=cost(made, 4) * 1.002, measure="flops")
    assert plan.ratios == (4, 4)


def test_the_smallest_and_the_largest_batches_are_timed():
    for number in (1, 2, 7, 8, 9, 10, 33):
        picked = costs.spread(number)
        assert len(picked) == len(set(picked)) == min(costs.BATCHES, number)
        assert {0, number - 1} <= set(picked)


def test_multiply_adds_are_counted_once_an_option(monkeypatch):
    calls, count = [], vk.flops.count
    monkeypatch.setattr(
        costs.flops, "count", lambda *given, **named: calls.append(1) or count(*given, **named)
    )
    made = model()
    (state,) = states(made)
    options = Options(state)
    given = whole(batches(2), inspect.signature(made.forward).parameters, 1)
    counted = costs.MultiplyAdds(made, state, given, options)
    assert len(calls) == 2 * (1 + 2 * len(state.sites))  # batches, dense and two ratios a site
    rng, total = random.Random(0), len(options.every)
    for _ in range(10):
        choice = tuple(rng.choice((i, i + 1, i + 2)) for i in range(0, total, 3))
        assert counted.of([choice])[choice] == counted._total(choice) / counted.dense


def test_every_token_is_as_likely_to_be_sampled():
    lengths, size = [5, 0, 1, 30, 4], 10
    places = losses.sample(lengths, size)
    assert sum(map(len, places)) == size and len(places) == len(lengths)
    for found, n in zip(places, lengths, strict=True):
        assert found.tolist() == sorted(set(found.tolist())) and all(0 <= p < n for p in found)
    assert all(map(torch.equal, places, losses.sample(lengths, size)))
    assert [len(found) for found in losses.sample(lengths, 100)] == lengths
    # The first token of a batch is no likelier than others.
    firsts = sum(int(0 in found) for found in losses.sample([100] * 200, 2000))
    assert 5 <= firsts <= 40
