"""Compressed attention under torch.compile, torch.export, ONNX's exporters and traces."""

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.sites import tiny, zoo
from tests.sites.attention_cases import patched, placed
from tests.sites.test_exporters import (  # noqa: F401
    as_onnx,
    export,
    fresh_compiler,
    needs_onnx,
    quiet,
)
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore")
some = pytest.mark.parametrize("name", ["bert", "t5", "modernbert"])


def one_layer(name):
    """For what takes seconds a layer. ModernBERT's second one is the first with a window; what
    layers share is in the exports and traces of whole models."""
    sizes = {} if name == "modernbert" else zoo.one_layer(name)
    return {f"config_{key}": value for key, value in sizes.items()}


class Hidden(nn.Module):
    """The encoder as a function of ids and, unless it is left out, a mask."""

    def __init__(self, model):
        super().__init__()
        self.model = find(model).encoder

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def encoder(name, *placements, **settings):
    """In eval mode as a whole: exporters bring back the mode of what they got, part by part."""
    return Hidden(patched(name, *placements, **settings).requires_grad_(False)).eval()


def check(found, model, mask=True, rows=1):
    """``found`` against the model itself: fewer tokens than k, a ragged group, padding, one row
    (in place of which there may be ``rows``)."""
    for lengths, left in (((2,) * rows, False), ((9, 5), True), ((16, 16, 3), False)):
        ids, real = tiny.batch(*lengths, left=left)
        inputs = (ids, real) if mask else (ids,)
        where = real.bool() if mask else torch.ones_like(real).bool()
        with torch.no_grad():
            out, expected = found(*inputs), model(*inputs)
        torch.testing.assert_close(out[where], expected[where], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "placement"),
    [("t5", "attention"), ("modernbert", "attention_kv")],
)
def test_compiles_whole_with_dynamic_sizes(name, placement):
    model = encoder(name, "ffn", placement, keep_first=1, **one_layer(name))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    check(compiled, model, rows=2)  # a batch of one is another graph, of numbers
    assert compiled(*tiny.batch(7, 4)).shape == (2, 7, 24)


@pytest.mark.parametrize(
    ("name", "placement"),
    [("bert", "attention_kv"), ("t5", "attention"), ("modernbert", "attention_kv")],
)
def test_exports_with_dynamic_sizes(name, placement):
    model = encoder(name, placement, keep_first=0 if name == "bert" else 1)
    check(export(model).module(), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "placement"), [("t5", "attention_kv"), ("modernbert", "attention")]
)
def test_exports_strictly(name, placement):
    model = encoder(name, placement, keep_first=0, **one_layer(name))
    check(export(model, strict=True).module(), model)


@needs_onnx
@pytest.mark.parametrize(
    ("name", "placement", "dynamo"),
    [  # The newer exporter takes longest: one model of each placement, of one layer.
        pytest.param("bert", "attention_kv", True, marks=pytest.mark.slow),
        pytest.param("t5", "attention", True, marks=pytest.mark.slow),
        ("bert", "attention", False),
        ("t5", "attention_kv", False),
        ("modernbert", "attention_kv", False),
        ("modernbert", "attention", False),
    ],
)
def test_onnx_is_right_at_every_length(name, placement, dynamo, tmp_path, quiet):  # noqa: F811
    model = encoder(name, placement, keep_first=0, **(one_layer(name) if dynamo else {}))
    check(as_onnx(model, tmp_path, dynamo), model)


@placed
@some
def test_a_trace_of_one_length_is_right_at_others(name, placement):
    for mask in (False, True):
        model = encoder(name, placement, keep_first=0 if mask else 1)
        traced = torch.jit.trace(model, tiny.batch(8)[: 2 if mask else 1])
        check(traced, model, mask=mask)


@placed
@some
def test_a_model_on_the_meta_device_has_shapes(name, placement):
    model = encoder(name, "ffn", placement, keep_first=1).to("meta")
    ids = torch.ones(2, 9, dtype=torch.long, device="meta")
    try:
        with vk.use_ratio(model, 1):
            model(ids)
    except RuntimeError as error:
        pytest.skip(f"transformers itself does not run {name} on the meta device: {error}")
    out = model(ids)
    assert out.shape == (2, 9, 24)
