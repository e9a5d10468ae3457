"""Calibration of merges in front of keys and values."""

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny, zoo
from variator_kernels.methods.variator.calibration.key_values import KeyValues
from variator_kernels.sites.find import find
from variator_kernels.sites.reach import reach_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def batches(count=24, n=24):
    return [
        dict(zip(("input_ids", "attention_mask"), tiny.batch(n, n - 3, seed=i), strict=True))
        for i in range(count)
    ]


def model(name, *placements, spread=2.0):
    made = zoo.plain(name)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if any(part in key for part in ("query", "key", ".q.", ".k.", "q_proj", "k_proj")):
                parameter.mul_(spread)  # attention that is far from even
    return vk.patch(made, 2, (2,), 6, placements=placements, keep_first=1)


@pytest.mark.parametrize(
    "name", ["bert", "t5", "longt5-global", "bart", "nomic_bert", "deberta-v2"]
)
def test_lowers_the_error(name):
    if name not in zoo.NAMES:
        pytest.skip(f"this version of transformers has no {name}")
    made = model(name, "attention_kv")
    table = vk.calibrate(made, batches())
    last = table.rows[-1]
    assert last.layer is None and last.after < 0.97 * last.before
    assert {row.placement for row in table.rows} == {"attention_kv", ""}
    assert "attention_kv" in str(table)


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "nomic_bert", "deberta-v2"])
def test_lowers_the_error_around_attention(name):
    if name not in zoo.NAMES:
        pytest.skip(f"this version of transformers has no {name}")
    made = model(name, "attention")
    table = vk.calibrate(made, batches())
    last = table.rows[-1]
    assert {row.placement for row in table.rows} == {"attention", ""}
    assert last.layer is None and last.after < 0.9 * last.before
    assert all(row.after <= row.before for row in table.rows)


@pytest.mark.parametrize("place", ["attention", "attention_kv"])
def test_beside_ffns_each_in_its_turn(place):
    made = model("bert", "ffn", place)
    table = vk.calibrate(made, batches(), passes=1)
    assert [(row.placement, row.layer) for row in table.rows] == [
        *((place, 0), ("ffn", 0), (place, 1), ("ffn", 1), ("", None))
    ]
    assert table.rows[-1].after < table.rows[-1].before
    assert all(row.after <= row.before for row in table.rows)


def test_received_attention_is_that_of_transformers():
    """The closed form's target, against the attention weights that the model itself returns."""
    for name in ("bert", "t5", "modernbert", "roformer", "deberta", "deberta-v2"):
        if name not in zoo.NAMES:
            continue
        made = zoo.plain(name, "eager")
        if name == "modernbert" and not hasattr(made.layers[0], "attention_type"):
            continue  # an older version of transformers, where it is refused
        vk.patch(made, 1, (2,), 6, placements=("attention_kv",))
        found = find(made)
        ids, mask = tiny.batch(9, 5)
        inputs = []
        hook = found.attentions[1].register_forward_pre_hook(
            lambda layer, args, kwargs, inputs=inputs: inputs.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            given = found.encoder(ids, attention_mask=mask, output_attentions=True).attentions[1]
            layer = found.attentions[1]
            hook.remove()
            site = KeyValues(layer.self_attention(), reach_of(layer), "reference")
            norm = site.attention.pre_norm
            from variator_kernels.ops.feed_forward import normalize

            h = normalize(inputs[0], norm.name, norm.weight, norm.bias, norm.eps)
            got = site._received(h, mask > 0, torch.arange(9)[None])
        expected = torch.where(mask[:, None, :, None] > 0, given, 0).sum((1, 2))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["attention", "attention_kv"])
def test_refuses_terms_of_places(place):
    made = model("layoutlmv3", place)
    before = [p.clone() for p in vk.plugin_parameters(made)]
    with pytest.raises(ValueError, match=r"calibrate must be of placements .*position_ids, bbox"):
        vk.calibrate(made, batches())
    assert all(map(torch.equal, vk.plugin_parameters(made), before))


def test_without_merge_nothing_moves():
    made = model("bert", "attention_kv")
    table = vk.calibrate(made, batches(), merge=False)
    assert not any(p.any() for p in vk.plugin_parameters(made))
    assert len(table.rows) == 1
