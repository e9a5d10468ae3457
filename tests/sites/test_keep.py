"""Tokens that stay whole in a patched model: by position, by id, by vk.keep."""

import contextlib
import copy

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from tests.sites.keep_cases import first_inputs, state_of, whole
from variator_kernels.sites.find import find

BACKENDS = ("reference", "auto")
HEADS = [("t5", "relu", "EncoderModel"), ("t5", "relu", "ForConditionalGeneration")]
HEADS += [("umt5", "gated-gelu", "EncoderModel"), ("bert", "gelu", "ForSequenceClassification")]
HEADS += [("roberta", "gelu", "Model"), ("electra", "relu", "Model")]
HEADS += [("distilbert", "gelu", "ForSequenceClassification")]


def expected_ends(mask, first, last):
    kept = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in enumerate(mask):
        places = real.nonzero().flatten().tolist()
        for place in [*places[:first], *(places[-last:] if last else [])]:
            kept[row, place] = True
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 1), (2, 1), (5, 5)])
@pytest.mark.parametrize(
    "variant", [("t5", "gated-gelu"), ("bert", "gelu"), ("distilbert", "gelu")]
)
def test_the_ends_of_a_row_get_the_dense_sublayer(variant, first, last, left, backend):
    model = tiny.patched(*variant, backend=backend, keep_first=first, keep_last=last).double()
    ids, mask = tiny.batch(11, 6, 1, left=left, width=13)
    x, out = first_inputs(model, ids, mask)
    real = mask.bool()
    expected = expected_ends(mask, first, last)
    found = whole(model, x, out)
    assert torch.equal(found & real, expected)


@pytest.mark.parametrize(("family", "act", "head"), HEADS)
@pytest.mark.parametrize("by", ["name", "position", "model"])
def test_ids_are_found_in_every_family(family, act, head, by):
    model = tiny.patched(family, act, head=head, keep=(7, 3), backend="reference").double()
    assert state_of(model).kept.ids == (3, 7)
    ids, mask = tiny.batch(11, 6)
    ids[0, 4] = ids[1, 2] = 3
    ids[0, 9] = 7
    seen = []
    real = state_of(model).context

    def watch(*args):
        seen.append(real(*args))
        return seen[-1]

    state_of(model).context = watch
    with torch.no_grad():
        if by == "model":
            extra = {"decoder_input_ids": ids[:, :2]} if head == "ForConditionalGeneration" else {}
            model(ids, attention_mask=mask, **extra)
        elif by == "position":
            tiny.encoder(model)(ids, mask)
        else:
            tiny.encoder(model)(attention_mask=mask, input_ids=ids)
    del state_of(model).context
    (context,) = seen
    assert torch.equal(context.keep.mask, (ids == 3) | (ids == 7))
    x, out = first_inputs(model, ids, mask)
    assert torch.equal(whole(model, x, out) & mask.bool(), ((ids == 3) | (ids == 7)) & mask.bool())


def test_padding_of_a_kept_id_is_padding():
    """The padding's id is 0, and its tokens pass through whatever is kept."""
    plain = tiny.patched("bert", "gelu", keep_first=0)
    model = tiny.patched("bert", "gelu", keep=(0,))
    ids, mask = tiny.batch(11, 6)
    assert not ids[mask == 1].eq(0).any()
    with torch.no_grad():
        got, wanted = tiny.encode(model, ids, mask), tiny.encode(plain, ids, mask)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [("t5", "relu"), ("roberta", "gelu")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_and_right_padding_are_equal(variant, backend):
    model = tiny.patched(*variant, backend=backend, keep_first=1, keep_last=2, keep=(5,)).double()
    ids, mask = tiny.batch(11, 6, width=13)
    left, left_mask = tiny.batch(11, 6, width=13, left=True)
    for row, n in enumerate((11, 6)):
        ids[row, n // 2] = 5
        left[row, 13 - n :] = ids[row, :n]
    with torch.no_grad():
        right = tiny.encode(model, ids, mask)[mask == 1]
        moved = tiny.encode(model, left, left_mask)[left_mask == 1]
        alone = tiny.encode(model, ids[1:, :6], mask[1:, :6])[0]
    torch.testing.assert_close(right, moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right[11:], alone, atol=1e-5, rtol=1e-5)


BAD = [
    ({"keep_first": True}, "keep_first must be an integer >= 0, got True"),
    ({"keep_first": -1}, "keep_first must be >= 0, got -1"),
    ({"keep_first": 1.0}, "keep_first must be an integer >= 0, got 1.0"),
    ({"keep_first": "1"}, "keep_first must be an integer >= 0, got '1'"),
    ({"keep_first": 2**31}, "keep_first must be <= 2147483647, got 2147483648"),
    ({"keep_first": torch.tensor(1)}, r"keep_first must be an integer >= 0, got tensor\(1\)"),
    ({"keep_last": None}, "keep_last must be an integer >= 0, got None"),
    ({"keep_last": False}, "keep_last must be an integer >= 0, got False"),
    ({"keep_last": 2**63}, "keep_last must be <= 2147483647"),
    ({"keep": 5}, r"keep must be several token ids, \(102,\) for one, got 5"),
    ({"keep": (5, True)}, "keep must be an integer >= 0, got True"),
    ({"keep": (5, -1)}, "keep must be >= 0, got -1"),
    ({"keep": (5, 1.0)}, "keep must be an integer >= 0, got 1.0"),
    ({"keep": "[SEP]"}, r"keep must be an integer >= 0, got '\['"),
    ({"keep": (5, 40)}, "keep must hold token ids below the vocabulary's size, 40, got 40"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
@pytest.mark.parametrize("family", ["t5", "distilbert"])
def test_refuses_bad_settings_and_leaves_the_model(settings, message, family):
    model = tiny.model(family, "relu")
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        vk.patch(model, **settings)
    assert tiny.snapshot(model) == before


def test_all_three_functions_take_them_by_name_alone():
    numpy = pytest.importorskip("numpy")
    for patch, family in ((vk.patch, "t5"), (vk.patch_t5, "mt5"), (vk.patch_bert, "bert")):
        model = patch(
            tiny.model(family, "gelu" if family == "bert" else "gated-gelu"),
            keep_first=numpy.int64(2),
            keep_last=1,
            keep=iter([5, 3, 5]),
        )
        assert state_of(model).kept == (2, 1, (3, 5), 64, ("first", "last", "ids"))
        with pytest.raises(TypeError, match="positional"):
            patch(tiny.model(family), 4, (2, 4), 6, "tanh", ("ffn",), "auto", 1)


def test_the_familys_default_is_for_new_plugins():
    for family, act in tiny.VARIANTS:
        model = vk.patch(tiny.model(family, act))
        assert state_of(model).kept == (find(model).family.keep_first, 0, (), 64, ())


def test_ids_need_input_ids():
    model = tiny.patched(keep=(5,))
    ids, mask = tiny.batch(11, 6)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"keep=\(5,\) needs the encoder's input_ids.*vk.keep"):
        model.encoder(inputs_embeds=embeddings, attention_mask=mask)
    assert state_of(model).local.context is None
    with pytest.raises(ValueError, match="needs the encoder's input_ids"):
        tiny.run(tiny.layers(model)[0], embeddings)
    with vk.use_ratio(model, 1), torch.no_grad():
        dense = model.encoder(inputs_embeds=embeddings, attention_mask=mask)
        tiny.run(tiny.layers(model)[0], embeddings)
        assert torch.equal(dense.last_hidden_state, tiny.encode(model, ids, mask))
    fixed = tiny.patched(keep_first=1)
    with torch.no_grad():
        got = fixed.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        assert torch.equal(got, tiny.encode(fixed, ids, mask))


@pytest.mark.parametrize("variant", [("t5", "relu"), ("bert", "gelu"), ("distilbert", "gelu")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_run_keeps_the_same(variant, reentrant):
    """Gradient checkpointing runs a block again in backward, when vk.keep's block is over."""
    plain = tiny.patched(*variant, keep_first=1, keep=(5,)).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids, mask = tiny.batch(11, 6)
    ids[0, 7] = 5
    kept = torch.zeros(2, 11, dtype=torch.bool)
    kept[:, 2] = True
    seen = []
    for model in (plain, saving):
        if reentrant:
            model.enable_input_require_grads()
        with vk.keep(model, kept):
            out = tiny.encode(model, ids, mask)
        with torch.no_grad():
            tiny.encode(model, *tiny.batch(7))
        (out * mask[..., None]).square().mean().backward()
        seen.append([p.grad for p in vk.plugin_parameters(model, (4,))])
    for got, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_a_forward_looks_up_its_level_once(monkeypatch):
    """Another thread may set the ratio meanwhile: mask and groups are those of one level."""
    model, (ids, mask) = tiny.patched(keep_first=1), tiny.batch(11, 6)
    state = state_of(model)
    four, dense = state.level, state.check(1)
    for first, then in ((dense, four), (four, dense)):
        vk.set_ratio(model, first)
        with torch.no_grad():
            expected = tiny.encode(model, ids, mask)
        answers = [first]
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(state, "current", lambda a=answers, b=then: a.pop() if a else b)
            assert torch.equal(tiny.encode(model, ids, mask), expected)


def test_copies_and_pickles_keep_the_same(tmp_path):
    model = tiny.patched(keep_first=1, keep_last=2, keep=(5,))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert state_of(loaded).kept == state_of(copy.deepcopy(model)).kept == state_of(model).kept


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    model = tiny.patched("bert", "gelu", keep_first=1, keep=(5,))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = tiny.batch(11, 6)
    ids[0, 7] = 5
    kept = torch.zeros(2, 11, dtype=torch.bool)
    kept[:, 4] = True
    for given in (None, kept, ~kept, None):
        with contextlib.nullcontext() if given is None else vk.keep(model, given), torch.no_grad():
            positions = tiny.positions(model, mask)
            got = compiled(ids, attention_mask=mask, **positions).last_hidden_state
            torch.testing.assert_close(got, tiny.encode(model, ids, mask), atol=1e-5, rtol=1e-4)
