"""precision="int8" in copies, threads, compiled and exported graphs, and under autocast."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import variator_kernels as vk
from tests.sites import int8_cases
from tests.sites.int8_cases import (
    OFF,
    defined,
    distance,
    forward,
    ready,
    small_layers,  # noqa: F401 - a fixture
    swapped,
)
from tests.sites.test_exporters import Hidden, needs_onnx
from variator_kernels.ops.int8_linear import kernels

pytestmark = int8_cases.marks


@torch.no_grad()
def test_copies_pickles_and_threads():
    model, _, batch = ready("bert")
    expected = forward(model, *batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(file, weights_only=False))
    for other in copies:
        assert len(swapped(other)) == len(swapped(model))
        assert torch.equal(forward(other, *batch), expected)
        vk.unpatch(other)
    same = []

    def run():
        with torch.no_grad():
            same.extend(torch.equal(forward(model, *batch), expected) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 15 and all(same)


@pytest.mark.parametrize("name", ["t5", "bert"])
@torch.no_grad()
def test_compiled(name):
    torch._dynamo.reset()
    kernels._choice.cache_clear()  # in a process that has chosen no kernel yet
    model, _, (ids, mask) = ready(name)
    compiled = torch.compile(
        lambda ids, mask: forward(model, ids, mask), fullgraph=True, backend="aot_eager"
    )
    full = torch.ones_like(mask)  # what forward picks has the size of the mask's sum
    for level in (2, 1) if name == "bert" else (2,):  # each is a graph, and takes seconds
        with vk.use_ratio(model, {"ffn": level, "attention_kv": 3 if level > 1 else 1}):
            found, expected = compiled(ids, full), forward(model, ids, full)
            assert distance(found, expected.double()) < OFF
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exported():
    torch._dynamo.reset()
    kernels._choice.cache_clear()  # in a process that has chosen no kernel yet
    model, exact, (ids, mask) = ready("bert")
    program = torch.export.export(model, (ids, mask), strict=False)
    names = {str(node.target) for node in program.graph.nodes}
    assert "variator.int8_linear.default" in names and "variator.compressed_ffn.default" in names
    found = program.module()(ids, mask).last_hidden_state[mask.bool()]
    assert distance(found, forward(model, ids, mask).double()) < OFF
    assert not torch.equal(found, forward(exact, ids, mask))
    traced = torch.jit.trace(model, (ids, mask), strict=False)
    found = traced(ids, mask)["last_hidden_state"][mask.bool()]
    assert distance(found, forward(model, ids, mask).double()) < OFF


@needs_onnx
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_refused(dynamo):
    model, _, batch = ready("bert")
    # The newer exporter tries other ways after an error, and raises that of the last.
    message = "ONNX" if dynamo else "precision='int8' cannot be exported to ONNX"
    with pytest.raises(Exception, match=message):
        torch.onnx.export(Hidden(model), batch, io.BytesIO(), dynamo=dynamo)


@torch.no_grad()
def test_autocast():
    model, exact, batch = ready("bert")
    with torch.autocast("cpu", torch.bfloat16):
        found, own = forward(model, *batch), forward(exact, *batch)
    expected = forward(defined(exact), *batch)
    assert distance(found, expected) < 0.05 and not torch.equal(found, own)
