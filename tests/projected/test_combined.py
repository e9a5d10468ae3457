"""Project, then patch: plugins work at a merged model as at any other."""

from __future__ import annotations

import pytest
import torch

import variator_kernels as vk
from tests.projected import cases


def multiply_adds(model, ratio: int) -> float:
    return vk.flops.count(model, 1, 64, ratio=ratio).multiply_adds.total


@pytest.mark.parametrize("name", ["llama", "t5-gated-gelu", "bert"])
def test_plugins_at_a_merged_model(name):
    model = cases.model(name)
    merged = vk.merge(cases.project(model, 0.8, start="pca"))
    inputs = cases.batch(merged, 3)
    dense = cases.output(merged, inputs)
    cost = [multiply_adds(made, 1) for made in (model, merged)]
    vk.patch(merged, 2, (2, 4), 6, placements=("ffn", "attention_kv"), keep_first=1)
    assert multiply_adds(merged, 2) < cost[1] < cost[0]
    compressed = cases.output(merged, inputs)
    assert torch.isfinite(compressed).all() and not torch.allclose(compressed, dense)
    with vk.use_ratio(merged, 1):
        assert torch.equal(cases.output(merged, inputs), dense)
    reference = vk.merge(cases.project(model, 0.8, start="pca"))
    vk.patch(reference, 2, (2, 4), 6, placements=("ffn", "attention_kv"), keep_first=1,
             backend="reference")  # fmt: skip
    torch.testing.assert_close(cases.output(reference, inputs), compressed)
    vk.unpatch(merged)
    assert torch.equal(cases.output(merged, inputs), dense)
