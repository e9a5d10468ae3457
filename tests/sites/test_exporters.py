"""Patched models under torch.export, ONNX's exporters, torch.jit.trace and torch.func."""

import importlib.util
import io
import logging
import warnings
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

import variator_kernels as vk
from tests.ops.cases import CPU
from tests.sites import tiny
from variator_kernels.sites.family import follow
from variator_kernels.sites.find import find

MODELS = BERT, T5, DISTILBERT = ("bert", "gelu"), ("t5", "relu"), ("distilbert", "gelu")
every_model = pytest.mark.parametrize("variant", MODELS)
every_choice = pytest.mark.parametrize("backend", ["auto", "reference"])
# Fewer tokens than k, whole groups, a ragged one, padding on either side, one row.
LENGTHS = [(3,), (8, 4), (11,), (9, 5), (16, 16, 2)]
SHAPES = ({0: Dim("rows", min=1, max=64), 1: Dim("tokens", min=2, max=64)},) * 2
missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Hidden(nn.Module):
    """A model as a function of ids and, unless it is left out, a mask."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def patched(variant, **settings):
    made = tiny.patched(*variant, head=tiny.bare(variant[0]), **settings)
    return Hidden(made.requires_grad_(False))


def export(model, strict=False, shapes=SHAPES):
    return torch.export.export(
        model, tiny.batch(9, 4)[: len(shapes)], dynamic_shapes=shapes, strict=strict
    )


def ops(program):
    names = (str(node.target) for node in program.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("variator."))


def check(found, model, tolerance=2e-5, mask=True):
    """``found`` against the model itself, on real tokens, at every length and side of padding."""
    for lengths in LENGTHS:
        for left in (False, True):
            ids, real = tiny.batch(*lengths, left=left, width=max(lengths) + 2 * left)
            inputs = (ids, real) if mask else (ids,)
            where = real.bool() if mask else torch.ones_like(real).bool()
            with torch.no_grad():
                out, expected = found(*inputs), model(*inputs)
            torch.testing.assert_close(out[where], expected[where], atol=tolerance, rtol=1e-4)


# An export takes seconds, and model, backend and exporter do not know of each other: every pair of
# them is here, not every triple. A strict one takes most, a layer like the other.
@pytest.mark.parametrize(
    ("variant", "backend", "strict"),
    [
        (BERT, "auto", False),
        (BERT, "reference", True),
        (T5, "auto", True),
        (T5, "reference", False),
        (DISTILBERT, "auto", False),
        (DISTILBERT, "reference", True),
    ],
)
def test_exports_with_dynamic_sizes(variant, backend, strict):
    layers = 1 if strict else 2
    model = patched(variant, backend=backend, num_layers=layers)
    program = export(model, strict)
    check(program.module(), model)
    fused = backend == "auto" and CPU is not None
    assert ops(program) == (Counter(compressed_ffn=layers) if fused else Counter())


@pytest.mark.parametrize(
    ("variant", "size"),
    [*((variant, Dim.DYNAMIC) for variant in MODELS), (BERT, Dim.AUTO)],  # AUTO refuses less
)
def test_exports_without_a_mask(variant, size):
    model = patched(variant)
    program = export(model, shapes=({0: size, 1: size},))
    check(program.module(), model, mask=False)


@every_model
def test_an_exported_program_can_be_kept_and_trained(variant):
    model = patched(variant).requires_grad_(True)
    file = io.BytesIO()
    torch.export.save(export(model), file)
    file.seek(0)
    program = torch.export.load(file)
    assert program.graph_signature.parameters
    module = program.module()
    check(module, model)
    ids, mask = tiny.batch(7, 6)
    for run in (module, model):
        run(ids, mask).square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".plugins.4." in name:
            # Sums over all tokens, some of which cancel: rounding is that of the largest ones.
            most = 1e-6 * float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, atol=most, rtol=1e-4)


@every_model
def test_exports_replaced_linears_and_levels(variant):
    model = patched(variant)
    layer, path = tiny.layers(model.model)[0], find(model.model).family.w_in[0]
    container, name = follow(layer, path.rpartition(".")[0]), path.rpartition(".")[2]
    old = getattr(container, name)
    new = type("Other", (nn.Linear,), {})(24, 40, bias=old.bias is not None).requires_grad_(False)
    new.load_state_dict(old.state_dict())
    setattr(container, name, new)
    program = export(model)
    check(program.module(), model)
    if CPU is not None:
        assert ops(program) == Counter(group_merge=1, adapter_decompress=1, compressed_ffn=1)
    vk.set_ratio(model.model, {"ffn": {0: 2, 1: 1}})
    check(export(model).module(), model)


@every_model
def test_compiled_with_dynamic_sizes_it_is_the_fused_op(variant):
    model = patched(variant, num_layers=1)
    seen = []

    def keep(graph, _):
        seen.append(sum("variator.compressed_ffn" in str(n.target) for n in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=keep)
    check(compiled, model)
    assert CPU is None or set(seen) == {1}


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def onnx_session(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        values = [value.numpy() for value in inputs]
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return run


def as_onnx(model, folder, dynamo):
    """``model`` with dynamic sizes, by one of the two exporters, in onnxruntime."""
    path = folder / "model.onnx"
    if dynamo:
        settings = {"dynamic_shapes": SHAPES, "verbose": False}
    else:
        axes = {0: "rows", 1: "tokens"}
        settings = {"input_names": ["ids", "mask"], "dynamic_axes": {"ids": axes, "mask": axes}}
    torch.onnx.export(model, tiny.batch(9, 4), path, dynamo=dynamo, **settings)
    return onnx_session(path)


@needs_onnx
@pytest.mark.parametrize(
    ("variant", "backend", "dynamo"),
    [  # The newer exporter takes longest: each model and backend once, BERT and "auto" below.
        pytest.param(T5, "reference", True, marks=pytest.mark.slow),
        pytest.param(DISTILBERT, "cpu", True, marks=pytest.mark.slow),
        (BERT, "reference", False),
        (BERT, "cpu", False),
        (T5, "auto", False),
        (T5, "cpu", False),
        (DISTILBERT, "auto", False),
        (DISTILBERT, "reference", False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_right_at_every_length(variant, backend, dynamo, tmp_path, quiet):
    if backend == "cpu" and CPU is None:
        pytest.skip("no CPU kernels")
    model = patched(variant, backend=backend, num_layers=1 if dynamo else 2)
    check(as_onnx(model, tmp_path, dynamo), model)


@every_model
@every_choice
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_one_length_is_right_at_others(variant, backend, mask):
    """A model that never ran: what it keeps from call to call may not show in the trace."""
    model = patched(variant, backend=backend)
    traced = torch.jit.trace(model, tiny.batch(8)[: 2 if mask else 1])
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    check(torch.jit.load(file), model, mask=mask)


@every_model
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_warning_is_no_part_of_a_trace(variant):
    """Whether plugins are trained, and whether the warning of it came, changes no graph."""
    graphs = []
    for warned in (False, True):
        torch.manual_seed(0)
        model = Hidden(vk.patch(tiny.model(*variant, head=tiny.bare(variant[0])), 4, (2, 4), 6))
        model.requires_grad_(False)
        if warned:
            with pytest.warns(UserWarning, match="untrained"):
                model(*tiny.batch(9))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*untrained")
            traced = torch.jit.trace(model, tiny.batch(9, 4), check_trace=False)
        graphs.append([node.kind() for node in traced.inlined_graph.nodes()])
    assert graphs[0] == graphs[1]


@every_model
def test_torch_func_over_a_model(variant):
    models = [
        tiny.patched(
            *variant, backend=backend, attn_implementation="eager", head=tiny.bare(variant[0])
        )
        for backend in ("auto", "reference")
    ]
    ids, mask = tiny.batch(9, 4)
    values = {n: p.detach() for n, p in models[0].named_parameters() if ".plugins.4." in n}
    steps = {name: torch.ones_like(value) for name, value in values.items()}

    def loss(model):
        def run(values):
            out = torch.func.functional_call(model, values, (ids,), {"attention_mask": mask})
            return out.last_hidden_state.square().mean()

        return run

    found, expected = (torch.func.grad(loss(model))(values) for model in models)
    assert all(value.abs().max() > 0 for value in expected.values())
    torch.testing.assert_close(found, expected)
    found, expected = (torch.func.jvp(loss(m), (values,), (steps,))[1] for m in models)
    assert expected != 0
    torch.testing.assert_close(found, expected)
    # What the transforms left behind is of no consequence.
    torch.testing.assert_close(loss(models[0])(values), loss(models[1])(values))


@every_model
@every_choice
def test_a_model_on_the_meta_device_has_shapes(variant, backend):
    ids = torch.ones(2, 9, dtype=torch.long, device="meta")
    try:
        tiny.model(*variant, head=tiny.bare(variant[0])).to("meta")(ids)
    except RuntimeError as error:
        pytest.skip(f"transformers {transformers.__version__} itself fails: {error}")
    model = tiny.patched(*variant, backend=backend, head=tiny.bare(variant[0])).to("meta")
    out = model(ids).last_hidden_state
    assert out.shape == (2, 9, 24)
    out.sum().backward()
    assert all(p.grad is not None for p in vk.plugin_parameters(model, [4]))


KEPT = {"keep_first": 2, "keep_last": 1, "keep": (5, 9)}


@pytest.mark.parametrize(("variant", "backend"), [(MODELS[0], "auto"), (MODELS[1], "reference")])
def test_exports_kept_tokens(variant, backend):
    model = patched(variant, backend=backend, num_layers=1, **KEPT)
    check(export(model).module(), model)
    first = patched(variant, backend=backend, num_layers=1, keep_first=1)
    check(export(first).module(), first)


@every_model
@pytest.mark.parametrize("kept", [{"keep_first": 1}, KEPT], ids=["first", "all"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_kept_tokens(variant, kept):
    model = patched(variant, **kept)
    check(torch.jit.trace(model, tiny.batch(8)), model)


def test_compiles_kept_tokens_with_dynamic_sizes():
    model = patched(MODELS[0], num_layers=1, **KEPT)
    check(torch.compile(model, fullgraph=True, dynamic=True, backend="eager"), model)


@needs_onnx
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_knows_kept_tokens(dynamo, tmp_path, quiet):
    model = patched(MODELS[0], num_layers=1, **KEPT)
    check(as_onnx(model, tmp_path, dynamo), model)
