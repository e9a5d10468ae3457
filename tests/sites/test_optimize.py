"""``optimize=``: packed products at dense levels, in patched sublayers or in all of the encoder."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from variator_kernels.ops import int8_linear, prepack
from variator_kernels.ops.frozen_linear import FrozenLinear
from variator_kernels.sites import dense
from variator_kernels.sites.find import find
from variator_kernels.sites.unchanged import check_attention

pytestmark = needs_cpu
BOTH = {"ffn": 2, "attention_kv": 2}


def plain(name: str, dtype=torch.float32) -> nn.Module:
    """A model whose weights are large enough to be packed."""
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaModel,
        ModernBertConfig,
        ModernBertModel,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "bert": lambda: BertModel(BertConfig(**sizes)),
        "modernbert": lambda: ModernBertModel(ModernBertConfig(**sizes, pad_token_id=0)),
        "llama": lambda: LlamaModel(LlamaConfig(**sizes)),
        "t5": lambda: T5EncoderModel(
            T5Config(vocab_size=100, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
        ),
    }[name]()
    return made.eval().requires_grad_(False).to(dtype)


def batch():
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 100, (3, 50), generator=source)
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def forward(model):
    return model(**batch()).last_hidden_state[batch()["attention_mask"].bool()]


@pytest.fixture
def fused(monkeypatch):
    """How many sublayers ran in few passes."""
    counts = {"ffn": 0, "attention": 0}

    def counted(name, run):
        def call(*args):
            y = run(*args)
            counts[name] += y is not None
            return y

        return call

    monkeypatch.setattr(dense, "feed_forward", counted("ffn", dense.feed_forward))
    monkeypatch.setattr(dense, "attention", counted("attention", dense.attention))
    return counts


def swapped(model):
    return [m for m in model.modules() if isinstance(m, FrozenLinear)]


NAMES = ["bert", "modernbert", "t5", "llama"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_level_is_as_near_to_float64_as_the_original(name, dtype):
    model = plain(name, dtype)
    exact, own = forward(plain(name, dtype).double()), forward(model)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    found = forward(model)
    blocks = find(model).blocks
    linear = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    assert linear and swapped(model) == linear
    assert "all linear layers of the encoder's blocks run packed" in vk.describe(model)
    assert all(prepack.cache.nbytes([layer.weight]) > 0 for layer in linear)
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_compressed_levels_and_undoing(name, precision):
    if precision and int8_linear.kernel() is None:
        pytest.skip(f"int8 products: {int8_linear.describe()}")
    model = plain(name)
    before, classes = forward(model), [type(m) for m in model.modules()]
    try:
        reference = vk.patch(copy.deepcopy(model), BOTH, (2,), 8, backend="reference")
    except ValueError as error:
        if "another version of transformers" in str(error):
            pytest.skip(str(error))
        raise
    vk.patch(model, BOTH, (2,), 8, optimize="encoder", precision=precision)
    expected, found = forward(reference), forward(model)
    off = (found - expected).norm() / expected.norm()
    assert (1e-5 if precision else 0) < off < (3e-2 if precision else 1e-5)
    vk.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(forward(model), before)


@pytest.mark.parametrize("placements", [("ffn",), ("attention_kv",), ("ffn", "attention")])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_dense_sublayers_run_in_few_passes(name, placements, fused):
    """Wherever plugins are, and beside compressed ones; padding on either side, holes."""
    model, given = plain(name), batch()
    given["attention_mask"][0, :4] = 0
    given["attention_mask"][2, 20:23] = 0
    real = given["attention_mask"].bool()
    exact, own = (m(**given).last_hidden_state[real] for m in (plain(name).double(), model))
    classes = [type(m) for m in model.modules()]
    try:
        check_attention(find(model))
    except ValueError as error:
        pytest.skip(str(error))
    vk.patch(model, 1, (2,), 8, placements=placements, optimize="encoder")
    with torch.no_grad():
        found = model(**given).last_hidden_state[real]
    assert fused == {"ffn": 2, "attention": 2}
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6
    assert (found.double() - exact).abs().max() <= allowed
    with vk.use_ratio(model, 2):
        forward(model)
    compressed = {"ffn": "ffn" in placements, "attention": placements != ("ffn",)}
    assert fused == {name: 2 if compressed[name] else 4 for name in fused}
    vk.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("variator" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_is_asked_for_besides_is_given(name, fused):
    """Attention weights, masks of pairs, hooks, gradients: those sublayers run as they were."""
    model = plain(name)
    twin, given = copy.deepcopy(model), batch()
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    none = {"ffn": 0, "attention": 0}

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    for m in (model, twin):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (m(**given, output_attentions=True) for m in (model, twin))
        same(found.attentions, expected.attentions)
        assert fused == none
        pairs = torch.ones(3, 1, 50, 50, dtype=torch.bool).tril()
        try:
            expected = twin(given["input_ids"], pairs).last_hidden_state
        except (ValueError, RuntimeError):  # older versions of transformers refuse such masks
            expected = None
        if expected is not None:
            same(model(given["input_ids"], pairs).last_hidden_state, expected)
        assert fused == none
        found, expected = (m(**given, output_hidden_states=True) for m in (model, twin))
        mask = given["attention_mask"].bool()
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            same(one[mask], other[mask])
        assert fused == {"ffn": 2, "attention": 2}
    seen = []
    first = find(model)
    norm = first.layers[0].layer_norm if name == "t5" else first.layers[0].output.LayerNorm
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    same(forward(model), forward(twin))
    assert seen == [1] and fused == {"ffn": 3, "attention": 4}
    handle.remove()
    with torch.no_grad():
        leaves = [m.get_input_embeddings()(given.pop("input_ids")) for m in (model,)]
    x = leaves[0].requires_grad_()
    model(inputs_embeds=x, **given).last_hidden_state.sum().backward()
    assert x.grad is not None and fused == {"ffn": 3, "attention": 4}


def test_sublayers_alone():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="sublayers")
    layer = find(model).blocks[0]
    assert swapped(layer) == [layer.intermediate.dense, layer.output.dense]
    vk.unpatch(model)
    vk.patch(model, 1, {"ffn": (2,), "attention_kv": (2,)}, 8, optimize="sublayers")
    assert len(swapped(find(model).blocks[0])) == 6


def test_without_it_a_dense_level_is_the_original():
    model = plain("bert")
    before = forward(model)
    assert not swapped(vk.patch(model, 1, (2,), 8))
    assert torch.equal(forward(model), before)


def test_gradients_are_the_originals():
    def gradient(optimize):
        model = vk.patch(plain("bert"), 2, (2,), 8, optimize=optimize).train()
        given = batch()
        embedded = model.embeddings(given.pop("input_ids")).detach().requires_grad_()
        torch.manual_seed(3)
        model(inputs_embeds=embedded, **given).last_hidden_state.square().sum().backward()
        return embedded.grad

    assert torch.equal(gradient("encoder"), gradient(None))


def test_a_changed_weight_is_noticed():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    forward(model)
    dense = find(model).blocks[0].attention.self.query
    dense.weight.data.mul_(3)
    twin = plain("bert")
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "plugins" not in k})
    torch.testing.assert_close(forward(model), forward(twin), rtol=1e-5, atol=1e-5)


def test_hooked_and_foreign_layers_stay():
    model = plain("bert")
    first = model.encoder.layer[0]
    first.attention.self.query.register_forward_hook(lambda *_: None)
    first.attention.self.key = type("Own", (nn.Linear,), {})(128, 128).requires_grad_(False)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    own = {id(first.attention.self.query), id(first.attention.self.key)}
    assert own.isdisjoint(map(id, swapped(model))) and len(swapped(model)) == 10


def test_copies_pickles_and_frozen_weights():
    model = vk.patch(plain("bert"), 2, (2,), 8, optimize="encoder")
    expected = forward(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(forward(made), expected)
    vk.freeze(model)
    assert torch.equal(forward(model), expected)  # and packs what was not packed before
    weight = find(model).blocks[0].attention.self.query.weight
    weight.data.mul_(3)  # against the promise: nobody looks
    assert torch.equal(forward(model), expected)
    vk.thaw(model)
    assert not torch.equal(forward(model), expected)


def test_weights_that_somebody_changed_since_multiply_as_they_are():
    """Quantised, pruned, parametrised after patching: their own products run, freeze looks away."""

    class Tenfold(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 10 if func is torch.nn.functional.linear else out

    for precision in (None, "int8"):
        model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder", precision=precision)
        first = find(model).blocks[0]
        dense = first.attention.self.query
        x = torch.randn(50, 128)
        with torch.no_grad():
            expected = nn.functional.linear(x, dense.weight, dense.bias)
            dense.weight = nn.Parameter(dense.weight.data.as_subclass(Tenfold), requires_grad=False)
            found = dense(x).as_subclass(torch.Tensor)
        torch.testing.assert_close(found, 10 * expected, rtol=1e-4, atol=1e-4)
        vk.freeze(model)
        vk.thaw(model)


def test_undoing_refuses_what_would_be_lost():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    query, key = (getattr(find(model).blocks[0].attention.self, n) for n in ("query", "key"))
    old = query.forward
    query.forward = lambda t: old(t)
    with pytest.raises(ValueError, match="forward of Linear was replaced after patching"):
        vk.unpatch(model)
    del query.forward
    nn.utils.parametrize.register_parametrization(key, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"after patching \(parametrised"):
        vk.unpatch(model)
    forward(model)


def test_compiled():
    torch._dynamo.reset()
    model = vk.patch(plain("bert"), 2, (2,), 8, optimize="encoder")
    given = batch()

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        found = compiled(given["input_ids"], given["attention_mask"])
        torch.testing.assert_close(found, run(*given.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimize": "all"}, r"optimize must be one of .*'sublayers', 'encoder'.*got 'all'"),
        ({"optimize": True}, "optimize must be one of"),
        ({"optimize": "encoder", "pack": False}, "pack must be True with optimize='encoder'"),
    ],
)
def test_refusals(settings, message):
    model = plain("bert")
    with pytest.raises(ValueError, match=message):
        vk.patch(model, 2, **settings)
    assert not swapped(model)


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, None),
        ({"optimize": "sublayers"}, "linear layers of patched sublayers run packed at"),
        ({"precision": "int8"}, "linear layers of patched sublayers run in int8 at"),
        ({"precision": "int8", "optimize": "encoder"}, "the encoder's blocks run in int8"),
    ],
)
def test_describe_says_what_runs_at_dense_levels(settings, row, monkeypatch):
    model = vk.patch(plain("bert"), 2, (2,), 8, **settings)
    lines = [line for line in vk.describe(model).splitlines() if line.startswith("optimized")]
    precision = settings.get("precision")
    if precision and int8_linear.kernel() is None:
        row = "nothing: linear layers run as they did"
    assert [row in line for line in lines] == ([] if row is None else [True])
    if precision:
        monkeypatch.setattr(int8_linear, "kernel", lambda: None)
        assert "nothing: linear layers run as they did" in vk.describe(model)


@pytest.mark.parametrize("level", [1, 2])
def test_a_table_of_distances_that_alone_is_trained_gets_its_gradient(level):
    gradients = []
    for backend in ("reference", "cpu"):
        model = plain("t5")
        more = {"placements": ("attention_kv",), "optimize": "encoder", "backend": backend}
        vk.patch(model, level, (2,), **more)
        model.requires_grad_(False)
        (table,) = (p for name, p in model.named_parameters() if "relative_attention_bias" in name)
        table.requires_grad_()
        model(**batch()).last_hidden_state.square().sum().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", ["t5", "modernbert"])
@pytest.mark.parametrize("way", ["hook", "module"])
def test_a_changed_inner_dropout_runs(name, way):
    """It is no dropout any more: the FFN runs as it is, at every level."""
    model = plain(name)
    owner, part = ("DenseReluDense", "dropout") if name == "t5" else ("mlp", "drop")
    for module in list(model.modules()):
        if hasattr(module, owner) and hasattr(getattr(module, owner), part):
            inner = getattr(module, owner)
            if way == "hook":
                getattr(inner, part).register_forward_hook(lambda _, args, out: 0.5 * out)
            else:
                setattr(inner, part, Half())
    expected = forward(model)
    vk.patch(model, 1, (2,), 8, optimize="encoder")
    torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    reference = plain(name)
    vk.patch(reference, 2, (2,), 8, backend="reference")
    vk.set_ratio(model, 2)
    assert not torch.allclose(forward(model), forward(reference), atol=1e-3)


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("where", ["block", "blocks' owner", "sublayer"])
def test_a_mask_that_a_hook_puts_in_reaches_attention(where):
    model = plain("bert")
    parts = {"block": model.encoder.layer[1], "blocks' owner": model.encoder,
             "sublayer": model.encoder.layer[0].attention}  # fmt: skip
    mask = torch.ones(50, 50, dtype=torch.bool).tril().expand(3, 1, 50, 50)

    def causal(module, args, kwargs):
        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": mask}
        return tuple(
            mask if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args
        ), kwargs

    full = forward(model)
    parts[where].register_forward_pre_hook(causal, with_kwargs=True)
    expected = forward(model)
    vk.patch(model, 1, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder")
    torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, expected, atol=1e-3)


def test_hooks_on_every_module_see_those_of_dense_sublayers():
    model = vk.patch(plain("bert"), 1, (2,), 8, optimize="encoder")
    expected, seen = forward(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(id(m)))
    try:
        torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)
    finally:
        handle.remove()
    assert {id(part.intermediate.dense) for part in model.encoder.layer} <= set(seen)
