"""Terms of pairs as the model has them, in configurations that a table of families hides."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import variator_kernels as vk
from tests.sites import zoo

CASES = [
    ("layoutlmv3", {"has_relative_attention_bias": a, "has_spatial_attention_bias": b})
    for a in (False, True)
    for b in (False, True)
] + [
    (name, {"pos_att_type": kinds})
    for name in ("deberta", "deberta-v2")
    for kinds in (["p2p", "c2p", "p2c"], ["c2p", "c2p"], ["p2c"])
]


def skip_unless_installed(name: str) -> None:
    if name not in zoo.NAMES:
        pytest.skip(f"this version of transformers has no {name}")


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_all_tokens_kept_is_the_dense_model(name, settings):
    skip_unless_installed(name)
    model, ids = zoo.plain(name, **settings), torch.randint(3, 40, (2, 12))
    more = {"bbox": torch.randint(0, 60, (2, 12, 4)).sort(-1)[0]} if name == "layoutlmv3" else {}
    for key, parameter in model.named_parameters():
        if "rel_pos" in key:
            parameter.data.normal_(std=2)
    compressed = vk.patch(copy.deepcopy(model), 2, placements=("attention_kv",))
    with torch.no_grad(), vk.keep(compressed, torch.ones_like(ids, dtype=torch.bool)):
        got, expected = compressed(ids, **more)[0], model(ids, **more)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", ["attention_kv", "attention"])
def test_places_on_a_page_of_packed_sequences(placement):
    skip_unless_installed("layoutlmv3")
    if transformers.__version__ < "5":
        pytest.skip("this version of transformers hands no packed sequences on")
    lengths, longest = [5, 1, 9, 3], 9
    model = vk.patch(zoo.plain("layoutlmv3"), 2, placements=(placement,))
    for key, parameter in model.named_parameters():
        if "rel_pos" in key:
            parameter.data.normal_(std=2)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 40, mask.shape) * mask
    boxes = torch.randint(0, 60, (*mask.shape, 4)).sort(-1)[0] * mask[..., None]
    places = (torch.arange(longest) + 1).expand(len(lengths), -1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        whole = model(ids, bbox=boxes, attention_mask=mask.long(), position_ids=places)[0][mask]
        got = model(
            ids[mask][None], bbox=boxes[mask][None], position_ids=places[mask][None],
            cu_seq_lens_q=offsets,
        )[0][0]  # fmt: skip
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


def test_a_second_pass_of_checkpointing_drops_the_same():
    skip_unless_installed("deberta-v2")
    model = zoo.plain(
        "deberta-v2", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3,
        max_position_embeddings=700, num_hidden_layers=1,
    )  # fmt: skip
    vk.patch(model, 2, placements=("attention_kv",)).train()
    found = []
    layer = model.encoder.layer[0].attention
    layer.register_forward_hook(lambda module, given, out: found.append(out[0].detach()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(inputs_embeds=torch.randn(8, 512, 24, requires_grad=True))[0].pow(3).sum().backward()
    assert len(found) == 2 and torch.equal(*found)


def test_attention_that_was_switched_to_blocks_is_refused():
    skip_unless_installed("big_bird")
    model = zoo.plain("big_bird", block_size=2, num_random_blocks=1)
    vk.patch(model, 2, placements=("attention_kv",))
    model.set_attention_type("block_sparse")
    with pytest.raises(TypeError, match=r"self must be a BigBirdSelfAttention.*got a BigBirdBlock"):
        model(torch.randint(3, 40, (1, 48)))


def test_positions_that_cut_a_row_under_flash_attention_are_refused():
    model = vk.patch(zoo.plain("bert"), 2)
    places = torch.cat([torch.arange(length) for length in (5, 4)])[None]
    ids = torch.randint(3, 40, (1, 9))
    with torch.no_grad():
        model(ids, position_ids=places)  # SDPA does not look at them
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="position_ids must rise by one"):
            model(ids, position_ids=places)
