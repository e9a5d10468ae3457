"""Calibration of decoders: FFNs are fitted, merged keys keep their initial values."""

import torch

import variator_kernels as vk
from tests.decoders import tiny
from variator_kernels import checkpoint


def test_calibrate():
    model = tiny.model(dtype=torch.float32, num_hidden_layers=2)
    vk.patch(model, {"ffn": 2, "attention_kv": 2}, ratios=(2,), window=5, keep_first=2)
    batches = [
        {"input_ids": tiny.ids(8, 24, seed), "attention_mask": torch.ones(8, 24).long()}
        for seed in range(2)
    ]
    batches[0]["attention_mask"][:4, :7] = 0
    table = vk.calibrate(model, batches, passes=1)
    whole = [row for row in table.rows if row.layer is None]
    assert all(row.after <= row.before for row in whole)
    assert {row.placement for row in table.rows if row.layer is not None} == {"ffn"}
    for layer in model.model.layers:
        assert not layer.self_attn.plugins["2"].merge.weight.any()
    assert checkpoint.gather(model)[0].untrained == {"attention_kv": {"2": [0, 1]}}


def test_without_a_whole_group_nothing_is_fitted():
    model = tiny.model(dtype=torch.float32, num_hidden_layers=2)
    vk.patch(model, {"ffn": 16}, ratios=(16,))
    rows = {"input_ids": tiny.ids(12, 12), "attention_mask": torch.ones(12, 12).long()}
    vk.calibrate(model, [rows], passes=1)
    assert checkpoint.gather(model)[0].untrained == {"ffn": {"16": [0, 1]}}
