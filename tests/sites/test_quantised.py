"""Models that torchao or torch.ao quantised to int8: they keep their weights, and stay on the fused
path; other layouts run as the modules that they are, and describe says so."""

from __future__ import annotations

import copy
import importlib.util
import io

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.ops.test_int8_linear import ISAS
from tests.sites import tiny
from tests.sites.int8_cases import distance, forward, patch, plain
from variator_kernels.ops import int8_linear
from variator_kernels.ops.compressed_ffn import stored_here
from variator_kernels.ops.int8_linear import kernels, module, torchao
from variator_kernels.ops.packed import cache
from variator_kernels.sites.find import find
from variator_kernels.sites.install import patched_sublayers, products_of

pytestmark = [needs_cpu, pytest.mark.filterwarnings("ignore")]
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
BOTH = {"ffn": 2, "attention_kv": 3}
NAMES = ["bert", "t5", "modernbert", "llama"]
DYNAMIC = ["torch.ao", "torch.ao, a scale a channel", pytest.param("torchao", marks=needs_torchao)]
WEIGHTS = pytest.param("torchao, weights", marks=needs_torchao)
HOWS = [*DYNAMIC, WEIGHTS]
BATCH = tiny.batch(19, 7, 12)
SEVEN = int8_linear.kernel() is None or int8_linear.kernel().levels.weight < 127
in_int8 = pytest.mark.skipif(SEVEN, reason=f"numbers of 8 bits: {int8_linear.describe()}")


def quantise(model, how, **settings):
    """``model`` itself, or a copy."""
    if how.startswith("torchao"):
        from torchao import quantization

        made = quantization.Int8DynamicActivationInt8WeightConfig
        made = quantization.Int8WeightOnlyConfig if "weights" in how else made
        quantization.quantize_(model, made(**settings))
        return model
    ao = torch.ao.quantization
    kinds = {nn.Linear: ao.per_channel_dynamic_qconfig} if "channel" in how else {nn.Linear}
    return ao.quantize_dynamic(model, kinds, **settings)


def ready(name="bert", how="torch.ao", ratio=BOTH, **settings):
    """A patched quantised model, and before that what it and its weights were."""
    model = quantise(plain(name), how)
    before = copy.deepcopy(model)
    ratios = {place: (k,) for place, k in ratio.items()}
    patch(model, ratio, ratios, 6, keep_first=1, **settings)
    tiny.train_plugins(model)
    return model, before


def as_modules(model, monkeypatch):
    """What the modules give in their place."""
    with monkeypatch.context() as patched:
        for home in ("compressed_ffn", "int8_linear.module"):
            name = f"variator_kernels.ops.{home}.stored_here"
            patched.setattr(name, lambda *tensors: False)
        return forward(model, *BATCH)


def dequantised(name, quantised, patched):
    """The model in float64 with the weights that the quantised ones stand for, and the plugins."""
    truth = plain(name)
    for path, twin in truth.named_modules():
        if isinstance(twin, nn.Linear):
            linear = quantised.get_submodule(path)
            weight = linear.weight() if callable(linear.weight) else linear.weight
            twin.weight.data = weight.dequantize().to(twin.weight.dtype)
    vk.patch(truth, BOTH, {place: (k,) for place, k in BOTH.items()}, 6, keep_first=1)
    plugins = {k: v for k, v in patched.state_dict().items() if ".plugins." in k}
    truth.load_state_dict(plugins, strict=False)
    return truth.double()


@pytest.mark.parametrize("how", DYNAMIC)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dynamic_int8(name, how, monkeypatch):
    """No further from the weights that the numbers stand for than the quantised modules are, and
    within a 30th of torchao's, a 20th of torch.ao's: a vector has 256 numbers from its least to its
    largest value, where torchao has 255 around 0, and torch.ao 128 for a whole batch."""
    model, before = ready(name, how)
    truth = forward(dequantised(name, before, model), *BATCH)
    found, theirs = forward(model, *BATCH), as_modules(model, monkeypatch)
    assert distance(found, truth) <= distance(theirs, truth) + 1e-6
    assert distance(found, theirs.double()) < (1 / 30 if how == "torchao" else 1 / 20)
    assert torch.equal(found, theirs) == SEVEN


@needs_torchao
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_weights_alone(name, dtype, monkeypatch):
    """The rule of every kernel: twice the error of what runs without it."""
    base = plain(name, dtype)
    model = quantise(base, "torchao, weights")
    before = copy.deepcopy(model)
    patch(model, BOTH, {place: (k,) for place, k in BOTH.items()}, 6, keep_first=1)
    tiny.train_plugins(model)
    truth = forward(dequantised(name, before, model), *BATCH)
    found, theirs = forward(model, *BATCH), as_modules(model, monkeypatch)
    assert found.dtype == dtype and not torch.equal(found, theirs)
    assert distance(found, truth) <= 2 * distance(theirs, truth) + 1e-6


@needs_torchao
@in_int8
@torch.no_grad()
def test_weights_alone_with_precision(monkeypatch):
    """``precision="int8"`` asks for vectors in int8 too."""
    model, before = ready("bert", "torchao, weights", precision="int8")
    truth = forward(dequantised("bert", before, model), *BATCH)
    assert 1e-3 < distance(forward(model, *BATCH), truth) < 1 / 30
    with vk.use_ratio(model, 1):
        assert 1e-3 < distance(forward(model, *BATCH), forward(before, *BATCH).double()) < 1 / 30


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_description_is_kept_and_weights_are_packed_once(name, how):
    model, _ = ready(name, how)
    forward(model, *BATCH)
    for layer in patched_sublayers(model):
        if layer.variator_site.site.placement != "ffn":
            found = layer.self_attention()
            assert found is layer.self_attention()
            assert all(isinstance(part, module.StoredProduct) for part in found.modules)
            continue
        found = layer.feed_forward()
        assert found is layer.feed_forward()
        numbers = [t for t in found.stored[:3] if t is not None]
        runs = "weights" in how or not SEVEN
        assert all(t.dtype == torch.int8 for t in numbers)
        assert all((cache.nbytes([t]) >= t.numel()) == runs for t in numbers)
        before = cache.nbytes(numbers)
        forward(model, *BATCH)
        assert cache.nbytes(numbers) == before
    inside = list(torchao.memory(model.parameters()))
    assert (len(inside) > 0) == how.startswith("torchao")
    vk.unpatch(model)
    assert cache.nbytes(inside) == 0


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dense_levels_and_unpatching(name, how):
    """Bit by bit what the quantised model gives; its state dict has the same keys and tensors."""
    model, before = ready(name, how)
    expected = forward(before, *BATCH)
    keys = [key for key in model.state_dict() if ".plugins." not in key]
    with vk.use_ratio(model, 1):
        assert torch.equal(forward(model, *BATCH), expected)
    forward(model, *BATCH)
    vk.unpatch(model)
    assert keys == list(model.state_dict()) == list(before.state_dict())
    pairs = zip(model.modules(), before.modules(), strict=True)
    assert all(type(a) is type(b) for a, b in pairs)
    assert torch.equal(forward(model, *BATCH), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    before.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(forward(before, *BATCH), expected)


@needs_torchao
@in_int8
@pytest.mark.parametrize("how", ["torchao", "torchao, weights"])
@pytest.mark.parametrize("optimize", ["sublayers", "encoder"])
@torch.no_grad()
def test_dense_levels_of_optimized_models(how, optimize):
    model, before = ready("bert", how, optimize=optimize)
    swapped = [m for m in model.modules() if type(m) is module.StoredLinear]
    blocks = find(model).blocks
    assert len(swapped) == sum(isinstance(m, nn.Linear) for b in blocks for m in b.modules())
    with vk.use_ratio(model, 1):
        found, expected = forward(model, *BATCH), forward(before, *BATCH)
    assert not torch.equal(found, expected)
    assert distance(found, expected.double()) < (1e-6 if "weights" in how else 1 / 30)
    vk.unpatch(model)
    inside = [m for block in find(model).blocks for m in block.modules()]
    assert {type(m) for m in inside if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("how", HOWS)
def test_training_runs_the_modules(how, monkeypatch):
    """With gradients, in training mode, and while others are compared with the model itself."""
    model, _ = ready("t5", how, {"ffn": 2})
    with torch.no_grad():
        expected = as_modules(model, monkeypatch)
        assert torch.equal(forward(model, *BATCH), expected) == (SEVEN and "weights" not in how)
        with int8_linear.own_precision():
            assert torch.equal(forward(model, *BATCH), expected)
    assert torch.equal(forward(model, *BATCH), expected)
    assert not stored_here(BATCH[0])
    model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = as_modules(model, monkeypatch)
        torch.manual_seed(0)
        assert torch.equal(forward(model, *BATCH), expected)


@needs_torchao
@pytest.mark.parametrize("how", ["torchao", "torchao, weights"])
@torch.no_grad()
def test_a_changed_weight_is_noticed(how):
    model, before = ready("bert", how)
    found = forward(model, *BATCH)
    product = products_of(find(model), patched_sublayers(model)[0].variator_site.site)[0]
    for change in (
        lambda: product.weight.scale.mul_(3),
        lambda: product.weight.qdata.neg_(),
        lambda: setattr(product, "weight", copy.deepcopy(product.weight * 1)),
        lambda: model.load_state_dict(before.state_dict(), strict=False),
    ):
        try:
            change()
        except NotImplementedError:  # torchao has no such operation
            continue
        old, found = found, forward(model, *BATCH)
        assert not torch.equal(old, found)
    assert distance(found, forward(ready("bert", how)[0], *BATCH).double()) < 1


@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_copies_files_and_frozen_weights(how, tmp_path):
    model, before = ready("bert", how)
    expected = forward(model, *BATCH)
    assert torch.equal(forward(copy.deepcopy(model), *BATCH), expected)
    vk.save_plugins(model, tmp_path)
    vk.load_plugins(before, tmp_path)
    assert torch.equal(forward(before, *BATCH), expected)
    vk.freeze(model)
    assert torch.equal(forward(model, *BATCH), expected)
    assert "frozen by vk.freeze" in vk.describe(model)
    vk.thaw(model)
    assert torch.equal(forward(model, *BATCH), expected)


@torch.no_grad()
def test_a_torch_ao_weight_that_is_replaced_is_noticed():
    model, _ = ready("bert", "torch.ao")
    before = forward(model, *BATCH)
    dense = find(model).blocks[0].intermediate.dense
    twice = torch.quantize_per_tensor(dense.weight().dequantize() * 2, 0.1, 0, torch.qint8)
    dense.set_weight_bias(twice, dense.bias())
    assert not torch.equal(forward(model, *BATCH), before)


def rows(model):
    lines = [line.split(None, 2) for line in vk.describe(model).splitlines()]
    return [line[2] for line in lines if line[:2] in (["int8", "weights"], ["as", "modules"])]


OTHERS = {
    "torch.ao, float16": "torch.ao dynamic Linear of torch.float16",
    "torchao, groups": r"torchao Int8Tensor with a scale for each [1, 8] of weights",
    "torchao, intx": "torchao IntxUnpackedToInt8Tensor",
    "zero points": "torchao Int8Tensor with zero points",
    "a part": "beside layers in int8",
    "two ways": "int8 weights with and without activations in int8 in one sublayer",
    "hooked": "hooked, or with a forward of somebody's own",
}


@pytest.mark.parametrize("how", OTHERS)
@torch.no_grad()
def test_other_layouts_run_as_modules_and_describe_says_so(how):
    if how not in ("torch.ao, float16",):
        pytest.importorskip("torchao")
    model = plain("bert")
    dense = [layer.intermediate.dense for layer in find(model).layers]
    if "float16" in how:
        model = quantise(model, "torch.ao", dtype=torch.float16)
    elif "groups" in how:
        from torchao.quantization.granularity import PerGroup

        quantise(model, "torchao, weights", granularity=PerGroup(8))
    elif "intx" in how:
        from torchao import quantization

        size = quantization.granularity.PerGroup(8)
        quantization.quantize_(model, quantization.IntxWeightOnlyConfig(granularity=size))
    elif how in ("a part", "two ways"):
        for linear in dense:
            quantise(linear, "torchao, weights")
        if how == "two ways":
            for layer in find(model).layers:
                quantise(layer.output, "torchao")
    else:
        quantise(model, "torchao")
        for linear in dense:
            if how == "hooked":
                linear.register_forward_hook(lambda *_: None)
            else:
                linear.weight.zero_point.fill_(1)
    vk.patch(model, 2, (2,), 6)
    assert rows(model) == [f"4 linear layers: {OTHERS[how]}"]
    assert all(layer.feed_forward().stored is None for layer in patched_sublayers(model))
    forward(model, *BATCH)
    vk.unpatch(model)


@pytest.mark.parametrize("how", HOWS)
def test_describe_says_what_runs(how):
    model, _ = ready("bert", how)
    (row,) = rows(model)
    runs = f"activations too, by {int8_linear.describe()}"
    if "weights" in how:
        runs = "activations not, packed in float32"
    elif SEVEN:
        runs = f"weights of 8 bits, int8 products are {int8_linear.describe()}"
    assert row.startswith(f"12 linear layers: {runs}")


@pytest.mark.skipif("avx2" not in ISAS, reason="the kernel of 7 bits is for AVX2")
@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_without_vnni(how, monkeypatch):
    """Numbers of 8 bits with activations in int8 stay modules; those of 7 bits need not."""
    seven = kernels.Choice(kernels.own("avx2"))
    monkeypatch.setattr(kernels, "choice", lambda *_: seven)
    model, _ = ready("bert", how)
    theirs = as_modules(model, monkeypatch)
    assert torch.equal(forward(model, *BATCH), theirs) == ("weights" not in how)
    assert "weights of 8 bits, int8 products are kernel for avx2" in vk.describe(model) or (
        "weights" in how
    )
    if how != "torchao":
        return
    model = quantise(plain("bert"), how, reduce_range=True)
    before = copy.deepcopy(model)
    vk.patch(model, BOTH, {place: (k,) for place, k in BOTH.items()}, 6, keep_first=1)
    tiny.train_plugins(model)
    truth = forward(dequantised("bert", before, model), *BATCH)
    found, theirs = forward(model, *BATCH), as_modules(model, monkeypatch)
    assert not torch.equal(found, theirs)
    assert distance(found, truth) <= distance(theirs, truth) + 1e-6
    assert "activations too, by kernel for avx2" in vk.describe(model)
