"""vk.calibrate: closer to the dense model, in every family, and nothing else changed."""

import pytest
import torch

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites import tiny
from variator_kernels.methods.variator.calibration import descent, run
from variator_kernels.methods.variator.calibration.fit import SiteFit
from variator_kernels.ops import prepack, prepacked_linear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:plugins are untrained")


@pytest.fixture
def few_steps(monkeypatch):
    """For tests that ask something else than how far the descent comes: it is most of the time."""
    monkeypatch.setattr(descent, "LEAST_STEPS", 8)


def model(family="t5", act="relu", backend="auto", **settings):
    """With plugins at their initial values."""
    made = tiny.model(family, act, **settings)
    return vk.patch(made, ratio=4, ratios=(2, 4), bottleneck=12, backend=backend)


def batches(number=12, left=False):
    made = []
    for seed in range(number):
        ids, mask = tiny.batch(23, 9, 17, 30, seed=seed)
        if left:
            ids, mask = (
                torch.stack(
                    [row.roll(30 - int(real.sum())) for row, real in zip(x, mask, strict=True)]
                )
                for x in (ids, mask)
            )
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@torch.no_grad()
def loss(made, ratio, seed=100):
    ids, mask = tiny.batch(21, 8, 27, 15, seed=seed)
    with vk.use_ratio(made, 1):
        teacher = tiny.encode(made, ids, mask)
    with vk.use_ratio(made, ratio):
        student = tiny.encode(made, ids, mask)
    return float((student - teacher)[mask != 0].square().mean())


@pytest.mark.parametrize(("family", "act"), tiny.VARIANTS)
def test_comes_closer_to_the_dense_model(family, act, monkeypatch):
    """And at every site the descent lowers what the closed form leaves of what it was fitted to."""
    errors, real = [], run.descend

    def measured(plugin, sublayer, spread, root, chunks, backend, *free):
        def error():
            now, rows = plugin.weights(), [chunk() for chunk in chunks]
            ffns = [sublayer(row.x, row.groups, row.positions) for row in rows]
            pairs = zip(rows, ffns, strict=True)
            return sum(float(descent._loss(row, now, ffn, root, backend)) for row, ffn in pairs)

        before = error()
        real(plugin, sublayer, spread, root, chunks, backend, *free)
        errors.append(error() / before)

    monkeypatch.setattr(run, "descend", measured)
    made = model(family, act)
    before = {k: loss(made, k) for k in (2, 4)}
    made.train()
    modes = [module.training for module in made.modules()]
    vk.calibrate(made, batches())
    assert [module.training for module in made.modules()] == modes
    made.eval()
    for k, value in before.items():
        assert loss(made, k) < 0.8 * value
    # Of a random model little can be fitted; what is left is the merge.
    assert len(errors) == 4 and max(errors) < 1.0 and min(errors) < 0.98, errors


@pytest.mark.parametrize(("family", "act"), [("t5", "relu"), ("bert", "gelu")])
def test_fits_what_is_not_kept_whole(family, act, monkeypatch):
    """In the groups that the model makes: the first token, the last and id 5 are in none."""
    made = tiny.patched(family, act, keep_first=1, keep_last=1, keep=(5,), backend="reference")
    with torch.no_grad():
        for parameter in vk.plugin_parameters(made):
            parameter.zero_()
    before = {k: loss(made, k) for k in (2, 4)}
    parts, real = [], run.part
    monkeypatch.setattr(run, "part", lambda *given: parts.append(real(*given)) or parts[-1])
    given = batches(left=True)
    vk.calibrate(made, given)
    for k, value in before.items():
        assert loss(made, k) < 0.8 * value
    ids, mask = (
        torch.cat([batch[key] for batch in given]) for key in ("input_ids", "attention_mask")
    )
    fitted = (mask == 1) & (ids != 5)
    for row, places in enumerate(mask):
        found = places.nonzero().flatten()
        fitted[row, found[0]] = fitted[row, found[-1]] = False
    assert all(part.groups.kept is not None for part in parts)
    assert all(len(part.tokens) == len(part.wanted) for part in parts)
    held_out = sum(len(part.tokens) for part in parts if part.held_out)
    assert held_out > 0 and sum(len(part.tokens) for part in parts) % int(fitted.sum()) == 0


@pytest.mark.parametrize("few", [False, True])
def test_where_all_is_kept_whole_nothing_is_fitted(few, few_steps):
    made = tiny.patched(keep_first=25 if few else 30, backend="reference")
    before = [p.clone() for p in vk.plugin_parameters(made)]
    given = batches(3)
    if few:  # only the last row has a token that is merged
        given = [{key: rows[:3] for key, rows in batch.items()} for batch in batches(4)]
        last = {key: rows[3:] for key, rows in batches(1)[0].items()}
        given.append(last)
    table = vk.calibrate(made, given)
    assert all(row.after <= row.before for row in table.rows)
    if few:
        return
    for parameter, value in zip(vk.plugin_parameters(made), before, strict=True):
        assert torch.equal(parameter, value)


def test_uses_real_tokens_alone():
    """In the closed form: descent goes through rows in another order, padded on the other side."""
    ids, mask = tiny.batch(21, 8, 27, 15, seed=100)
    outputs = []
    for left in (False, True):
        made = model()
        vk.calibrate(made, batches(left=left), ratios=[4], passes=0)
        with torch.no_grad():
            outputs.append(tiny.encode(made, ids, mask)[mask != 0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_how_sequences_are_cut_into_batches_does_not_matter(family, few_steps):
    joined = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}
    order = joined["attention_mask"].sum(1).argsort()
    joined = {key: rows[order] for key, rows in joined.items()}
    cut = []
    for first, last in ((0, 7), (7, 7), (7, 29), (29, 48)):
        part = {key: rows[first:last] for key, rows in joined.items()}
        width = int(part["attention_mask"].sum(1).max()) if last > first else 5
        cut.append({key: rows[:, :width] for key, rows in part.items()})
    assert len({batch["attention_mask"].shape[1] for batch in cut}) > 2
    found = []
    for given in ([joined], cut, cut[::-1]):
        made = model(family)
        vk.calibrate(made, given, ratios=[2])
        found.append(loss(made, 2))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    # Which sequences are held out depends on their order.
    assert found[0] == pytest.approx(found[2], rel=0.1)


def test_a_sublayer_that_two_layers_share(few_steps):
    made = tiny.model()
    made.encoder.block[1].layer[-1] = made.encoder.block[0].layer[-1]
    vk.patch(made, ratio=2, ratios=(2,), bottleneck=12)
    before = loss(made, 2)
    vk.calibrate(made, batches())
    assert loss(made, 2) < before


@needs_cpu
def test_runs_on_packed_weights_and_frees_them(monkeypatch, few_steps):
    monkeypatch.setattr(prepacked_linear, "LEAST", 1)
    packed, real = [], prepack.linear
    monkeypatch.setattr(
        prepack, "linear", lambda *args, **more: packed.append(args[0]) or real(*args, **more)
    )
    plain, ours = model(backend="reference"), model(backend="cpu")
    modules = []
    real_fit = SiteFit.fit
    monkeypatch.setattr(
        SiteFit, "fit", lambda fit, *rest: modules.append(fit.ffn.module) or real_fit(fit, *rest)
    )
    vk.calibrate(plain, batches())
    assert not packed
    vk.calibrate(ours, batches())
    assert modules and not any(modules)  # a packed sublayer is described as the plain one it is
    attention = {
        id(w) for name, w in ours.named_parameters() if "encoder" in name and ".q." in name
    }
    assert attention <= {id(weight) for weight in packed}
    assert prepack.cache.nbytes(ours.parameters()) == 0
    for k in (2, 4):
        assert loss(ours, k) == pytest.approx(loss(plain, k), rel=1e-3)


def test_changes_what_it_is_asked_to_change(few_steps):
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    vk.calibrate(made, batches(), ratios=[4], merge=False)
    changed = {
        name for name, value in made.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed and all(".plugins.4.adapter." in name for name in changed)
    vk.calibrate(made, batches(), ratios=[2], adapter=False)
    changed = {
        name for name, value in made.state_dict().items() if not torch.equal(value, before[name])
    }
    assert all(".plugins.4.adapter." in n or ".plugins.2.merge." in n for n in changed)


def test_identity_adapters_too():
    made = vk.patch(tiny.model(), ratio=4, ratios=(4,), bottleneck=12, activation="identity")
    before = loss(made, 4)
    vk.calibrate(made, batches())
    assert loss(made, 4) < 0.8 * before


def test_an_error_changes_nothing(monkeypatch, few_steps):
    made = model()
    vk.calibrate(made, batches(), ratios=[2])
    before = [p.clone() for p in vk.plugin_parameters(made)]
    real, calls = SiteFit._set_adapter, []

    def broken(*args):
        calls.append(real(*args))
        if len(calls) == 3:
            raise RuntimeError("in the first layer of the second ratio")

    monkeypatch.setattr(SiteFit, "_set_adapter", broken)
    with pytest.raises(RuntimeError, match="in the first layer"):
        vk.calibrate(made, batches(20))
    assert all(map(torch.equal, vk.plugin_parameters(made), before))
    with torch.no_grad():
        made.encoder.block[1].layer[0].SelfAttention.q.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="hidden states behind FFN 1 are not finite"):
        vk.calibrate(made, batches(20))
    with torch.no_grad():
        made.encoder.block[1].layer[0].SelfAttention.q.weight.fill_(0)
        made.shared.weight[7] = float("nan")
    rare = [
        {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 7, 8)}
        for batch in batches(20)
    ]
    rare[-1]["input_ids"][0, 0] = 7
    with pytest.raises(FloatingPointError, match="hidden states behind FFN 0 are not finite"):
        vk.calibrate(made, rare)
    assert all(map(torch.equal, vk.plugin_parameters(made), before))


def test_refuses_what_it_cannot_use():
    made = model()
    with pytest.raises(ValueError, match="not patched"):
        vk.calibrate(tiny.model(), batches())
    with pytest.raises(ValueError, match="at least 10 sequences, got 8"):
        vk.calibrate(made, batches(2))
    with pytest.raises(ValueError, match=r"must hold attention_mask, got \['input_ids'\]"):
        vk.calibrate(made, [{"input_ids": b["input_ids"]} for b in batches(3)])
    with pytest.raises(ValueError, match="got 3"):
        vk.calibrate(made, batches(), ratios=[3])
    assert made.encoder.variator_state.local.observer is None
