"""vk.calibrate: no harm at the model's end, bounded memory, inputs in any form."""

import weakref

import pytest
import torch

import variator_kernels as vk
from tests.methods.test_calibration import batches, few_steps, model  # noqa: F401
from tests.sites import tiny
from variator_kernels.methods.variator.calibration import inputs, streams
from variator_kernels.methods.variator.calibration.fit import SiteFit, part
from variator_kernels.ops.groups import Groups
from variator_kernels.runtime.state import STATE
from variator_kernels.sites.feed_forward import describe
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:plugins are untrained")


def with_sink(family="bert", act="gelu", strength=12.0):
    """A model whose layers send a great deal to the first token, which all others attend to."""
    made = tiny.model(family, act, num_layers=3)
    with torch.no_grad():
        embeddings = made.embeddings.word_embeddings.weight
        embeddings[1] = 0
        embeddings[1, 0] = 20
        for i, layer in enumerate(made.encoder.layer):
            layer.output.dense.weight[:, 0] = 0
            layer.intermediate.dense.weight[0] = 0
            layer.intermediate.dense.weight[0, 0] = 5
            layer.intermediate.dense.bias[0] = -4
            layer.output.dense.weight[i % 2, 0] = strength
            layer.attention.self.key.weight[:, 0] += 1
            layer.attention.self.query.bias += 1
    return vk.patch(made, ratio=2, ratios=(2, 4), bottleneck=4)


def marked(number, start=0):
    made = batches(number + start)[start:]
    for batch in made:
        batch["input_ids"][:, 0] = 1
    return made


@torch.no_grad()
def final(made, levels, given):
    """The final error of each level."""
    wrong, total = [0.0] * len(levels), 0.0
    for batch in given:
        real = batch["attention_mask"] != 0
        with vk.use_ratio(made, 1):
            dense = tiny.encode(made, *batch.values())[real].double()
        total += float(dense.square().sum())
        for i, level in enumerate(levels):
            with vk.use_ratio(made, level):
                ours = tiny.encode(made, *batch.values())[real].double()
            wrong[i] += float((ours - dense).square().sum())
    return [error / total for error in wrong]


def levels(made, k):
    return [k, *({"ffn": {i: k}} for i in range(len(tiny.layers(made))))]


# Few texts and a strong sink are where values harm; each stands beside its opposite once.
@pytest.mark.parametrize(("strength", "number"), [(12.0, 4), (3.0, 24), (12.0, 24)])
def test_harms_no_site_and_no_ratio(strength, number):
    made, other = with_sink(strength=strength), marked(24, start=40)
    before = {k: final(made, levels(made, k), other) for k in (2, 4)}
    table = vk.calibrate(made, marked(number))
    for k, old in before.items():
        new = final(made, levels(made, k), other)
        assert all(b <= 1.01 * a for a, b in zip(old, new, strict=True)), (k, old, new, str(table))
        rows = [row for row in table.rows if row.ratio == k]
        assert [row.layer for row in rows] == [0, 1, 2, None]
        assert all(row.after <= row.before for row in rows)


def test_values_that_harm_at_the_end_are_not_taken(monkeypatch, few_steps):  # noqa: F811
    real = SiteFit._set_adapter

    def wrong(fit, plugin, found):
        real(fit, plugin, found)
        plugin.adapter.b2[::2] += 50  # a norm would take away a shift of all

    made = model("bert", "gelu")
    before = [p.clone() for p in vk.plugin_parameters(made)]
    monkeypatch.setattr(SiteFit, "_set_adapter", wrong)
    table = vk.calibrate(made, batches())
    assert all(map(torch.equal, vk.plugin_parameters(made), before))
    assert all(row.after == row.before and not row.step for row in table.rows)


def test_the_table_is_what_the_model_does(few_steps):  # noqa: F811
    made, given = model(), batches()
    table = vk.calibrate(made, given)
    rows = {(row.ratio, row.layer): row for row in table.rows}
    for k in (2, 4):
        for layer, error in zip((None, 0, 1), final(made, levels(made, k), given), strict=True):
            # On all sequences, not only on those held out.
            assert error == pytest.approx(rows[k, layer].after, rel=0.3)
    lines = str(table).splitlines()
    assert len(lines) == 7 and lines[-1].split()[:2] == ["4", "all"]


def test_twice_the_same_and_from_a_generator(few_steps):  # noqa: F811
    found = []
    for given in (batches(), batches(), (batch for batch in batches())):
        made = model()
        found.append((vk.calibrate(made, given), [p.clone() for p in vk.plugin_parameters(made)]))
    for table, values in found[1:]:
        assert table == found[0][0] and all(map(torch.equal, values, found[0][1]))


def test_calibrated_again_it_comes_out_no_worse(few_steps):  # noqa: F811
    made = model()
    first = vk.calibrate(made, batches())
    second = vk.calibrate(made, batches())
    for a, b in zip(first.rows, second.rows, strict=True):
        assert b.after <= b.before and b.before == pytest.approx(a.after, rel=1e-5)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of results that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key):
        self.alive -= self.seen.pop(key, 0)


def peak(monkeypatch, number):
    monkeypatch.setattr(inputs, "CHUNK", 256)
    monkeypatch.setattr("variator_kernels.methods.variator.calibration.hidden_states.SAMPLE", 512)
    monkeypatch.setattr(inputs, "HELD_OUT", 256)
    made = model(backend="reference", d_model=64, d_kv=16, d_ff=64)
    given = batches(number)
    held = sum(x.nbytes for batch in given for x in batch.values())
    with Peak() as mode:
        vk.calibrate(made, given, ratios=[2], passes=1)
    return mode.most, held


def test_memory_does_not_grow_with_the_number_of_batches(monkeypatch):
    few, _ = peak(monkeypatch, 20)
    many, held = peak(monkeypatch, 100)
    # Token ids and masks stay, and the groups; a hidden state would be 16 times the ids.
    assert many < few + 4 * held, (few, many, held)


def test_temporary_files_are_closed_also_after_an_error(monkeypatch):
    made, closed, opened = model(), [], []
    real = streams.Store.close
    monkeypatch.setattr(streams.Store, "close", lambda s: closed.append(s) or real(s))
    init = streams.Store.__init__
    monkeypatch.setattr(streams.Store, "__init__", lambda s: opened.append(s) or init(s))
    monkeypatch.setattr(
        streams.Store, "__setitem__", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        vk.calibrate(made, batches())
    assert opened and set(map(id, opened)) == set(map(id, closed))
    assert not any("forward" in vars(module) for module in made.modules())


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("attention_mask", torch.ones(4, 30, 30), r"must have shape \[batch, length\]"),
        ("position_ids", torch.arange(30)[None], "got position_ids of"),
    ],
)
def test_refuses_arguments_that_are_no_row_a_sequence(key, value, match):
    made = model("bert", "gelu")
    before = [p.clone() for p in vk.plugin_parameters(made)]
    with pytest.raises(ValueError, match=match):
        vk.calibrate(made, [{**batch, key: value} for batch in batches()])
    assert all(map(torch.equal, vk.plugin_parameters(made), before))


@pytest.mark.parametrize("family", ["t5", "bert", "distilbert"])
def test_blocks_run_apart_give_what_the_encoder_gives(family):
    made = model(family, "gelu" if family != "t5" else "relu")
    found, given = find(made), batches(1)[0]
    state = vars(found.encoder)[STATE]
    blocks = streams.Blocks(made, found, state)
    with torch.no_grad(), vk.use_ratio(made, 2):
        whole = tiny.encode(made, *given.values())
    with torch.no_grad(), blocks.installed():
        x, real = blocks.run(given, 2, 0, 1), given["attention_mask"] != 0
        for again in (blocks.run(given, 2, 1, hidden=x), blocks.run(given, 2)):
            torch.testing.assert_close(again[real], whole[real], rtol=1e-5, atol=1e-5)


def test_kept_tokens_are_not_fitted():
    x, dense = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    start = torch.tensor([[0, 1, 3], [5, 6, 8]])
    span = torch.tensor([[1, 2, 2], [1, 2, 2]])
    kept = torch.tensor([[True, False, False]] * 2)
    groups = Groups(start, span, None, kept, None, 2, "listed")
    ffn = describe(tiny.layers(tiny.model("bert", "gelu"))[0])
    found = part(x, dense, groups, ffn, False)
    assert found.place.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert found.group.tolist() == [1, 1, 2, 2, 4, 4, 5, 5]
    assert torch.equal(found.wanted, (dense - x).flatten(0, 1)[found.place])


def test_a_level_of_its_own():
    """Plugins of a mixed level, each fitted behind the others as they stand in it, alone."""
    level = {"ffn": {0: 4, 2: 2}}
    made = vk.patch(tiny.model("bert", "gelu", num_layers=3), 2, (2, 4), 4)
    layers = find(made).layers
    before = [[p.clone() for p in layer.plugins.parameters()] for layer in layers]
    names = [[name for name, _ in layer.plugins.named_parameters()] for layer in layers]
    start = final(made, [level], batches())[0]
    table = vk.calibrate(made, batches(), [level])
    assert final(made, [level], batches())[0] < start
    moved = {
        (i, name.split(".")[0])
        for i, (layer, old) in enumerate(zip(layers, before, strict=True))
        for name, a, b in zip(names[i], old, layer.plugins.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved and moved <= {(0, "4"), (2, "2")}
    assert [(row.ratio, row.layer) for row in table.rows] == [(4, 0), (2, 2), (None, None)]
    assert "mixed" in str(table)


def test_a_uniform_level_is_that_ratio():
    every = [vk.patch(tiny.model("bert", "gelu"), 2, (2, 4), 4) for _ in range(2)]
    tables = [
        vk.calibrate(made, batches(), [level])
        for made, level in zip(every, (4, {"ffn": 4}), strict=True)
    ]
    assert tables[0] == tables[1]
    for a, b in zip(*map(vk.plugin_parameters, every), strict=True):
        assert torch.equal(a, b)


def test_a_plugin_named_twice_is_refused():
    made = vk.patch(tiny.model("bert", "gelu"), 2, (2, 4), 4)
    with pytest.raises(ValueError, match=r"each plugin once, ffn 1 at ratio 4 is in two"):
        vk.calibrate(made, batches(), [4, {"ffn": {0: 2, 1: 4}}])
    with pytest.raises(ValueError, match="one that has plugins"):
        vk.calibrate(made, batches(), [{"ffn": 3}])
