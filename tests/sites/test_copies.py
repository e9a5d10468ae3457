"""Copies, pickles and checkpoints of a patched model."""

import copy
import io
import logging
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites import classes
from variator_kernels.sites.find import find


def test_a_deep_copy_has_its_own_ratio():
    model = tiny.patched()
    twin = copy.deepcopy(model)
    ids, mask = tiny.batch(9, 4)
    assert torch.equal(tiny.encode(twin, ids, mask), tiny.encode(model, ids, mask))
    vk.set_ratio(twin, 2)
    with vk.use_ratio(model, 1):
        assert twin.encoder.variator_state.current().uniform == 2
    assert model.encoder.variator_state.current().uniform == 4
    shared = {id(vars(m)["variator_state"]) for m in twin.modules() if "variator_state" in vars(m)}
    assert len(shared) == 1
    assert not {id(p) for p in vk.plugin_parameters(twin)} & {
        id(p) for p in vk.plugin_parameters(model)
    }
    vk.unpatch(twin)
    assert "variator_state" in vars(model.encoder)


def test_a_copy_inside_use_ratio_does_not_inherit_it():
    model = tiny.patched()
    with vk.use_ratio(model, 2):
        assert copy.deepcopy(model).encoder.variator_state.current().uniform == 4


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_pickle(variant):
    model = tiny.patched(*variant)
    again = pickle.loads(pickle.dumps(model))
    ids, mask = tiny.batch(9, 4)
    assert type(tiny.encoder(again)) is type(tiny.encoder(model))
    assert torch.equal(tiny.encode(again, ids, mask), tiny.encode(model, ids, mask))


@pytest.mark.parametrize("variant", [("mt5", "gated-gelu"), ("bert", "gelu")])
def test_torch_save_opens_in_a_fresh_process(variant, tmp_path):
    model = tiny.patched(*variant)
    ids, mask = tiny.batch(9, 9)
    torch.save((model, ids, mask, tiny.encode(model, ids, mask)), tmp_path / "model.pt")
    script = """
        import sys, torch
        torch.set_num_threads(1)
        model, ids, mask, expected = torch.load(sys.argv[1], weights_only=False)
        encoder = model if model.config.model_type == "bert" else model.encoder
        out = encoder(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        import variator_kernels as vk
        vk.set_ratio(model, 2)
        vk.unpatch(model)
        assert type(encoder).__module__.startswith("transformers.")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_classes_are_found_by_name_alone():
    assert classes.T5Stack is classes.T5Stack
    assert classes.T5Stack.__module__ == classes.__name__
    assert classes.BertLayer is classes.BertLayer
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchLayer'"):
        _ = classes.NoSuchLayer


def test_state_dict_round_trip():
    model, other = tiny.patched(), vk.patch(tiny.model(), ratios=(2, 4), bottleneck=6)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    ids, mask = tiny.batch(9, 4)
    assert torch.equal(tiny.encode(other, ids, mask), tiny.encode(model, ids, mask))


HEADS = [
    ("t5", "ForConditionalGeneration"),
    ("t5", "EncoderModel"),
    ("t5", "ForTokenClassification"),
    *((family, head) for family in tiny.BERTS for head in ("Model", "ForMaskedLM")),
    *((family, "ForSequenceClassification") for family in tiny.BERTS),
]


@pytest.mark.parametrize(("family", "head"), HEADS)
@pytest.mark.parametrize("nested", [False, True])
def test_save_pretrained_is_what_plain_transformers_loads(family, head, nested, tmp_path, caplog):
    model = tiny.model(family, "relu", head=head)
    dense = copy.deepcopy(model)
    vk.patch(model)
    saved, plain = (find(m).encoder if nested else m for m in (model, dense))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        saved.save_pretrained(tmp_path / "patched")
        plain.save_pretrained(tmp_path / "dense")
        loaded, info = type(plain).from_pretrained(tmp_path / "patched", output_loading_info=True)
        reloaded, expected = type(plain).from_pretrained(
            tmp_path / "dense", output_loading_info=True
        )
    assert not [record for record in caplog.records if "plugins" in record.getMessage()]
    for key, found in info.items():
        assert not found or found == expected[key], key
    assert type(loaded) is type(plain)
    assert loaded.state_dict().keys() == reloaded.state_dict().keys()
    for key in (
        reloaded.state_dict().keys() - info["missing_keys"]
    ):  # a head's encoder has no pooler
        value = reloaded.state_dict()[key]
        assert torch.equal(loaded.state_dict()[key], value), key
    written = [(tmp_path / name / "config.json").read_text() for name in ("patched", "dense")]
    assert written[0] == written[1]


def test_what_the_model_leaves_out_stays_its_own(tmp_path):
    model = tiny.model()
    model._keys_to_ignore_on_save = {"mine"}
    vk.patch(model).save_pretrained(tmp_path)
    assert model._keys_to_ignore_on_save == {"mine"}
    del model._keys_to_ignore_on_save
    model.save_pretrained(tmp_path)
    assert "_keys_to_ignore_on_save" not in vars(model)
