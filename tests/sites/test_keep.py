"""Tokens that stay whole in a patched model: by position, by id, by vk.keep."""

import asyncio
import contextlib
import copy
import threading

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.state import kept_masks, observe
from variator_kernels.sites.find import find

BACKENDS = ("reference", "auto")
HEADS = [("t5", "relu", "EncoderModel"), ("t5", "relu", "ForConditionalGeneration")]
HEADS += [("umt5", "gated-gelu", "EncoderModel"), ("bert", "gelu", "ForSequenceClassification")]
HEADS += [("roberta", "gelu", "Model"), ("electra", "relu", "Model")]
HEADS += [("distilbert", "gelu", "ForSequenceClassification")]


def state_of(model):
    return tiny.encoder(model).variator_state


def first_inputs(model, *args, **settings):
    """What layer 0's sublayer takes in a forward, and what it gives."""
    seen = []
    layer = tiny.layers(model)[0]
    watch = observe(state_of(model), lambda at, x, mask, k: seen.append(x) if at is layer else None)
    outputs = []
    original = state_of(model).method.feed_forward

    def record(at, *given):
        out = original(at, *given)
        if at is layer:
            outputs.append(out)
        return out

    state_of(model).method.feed_forward = record
    try:
        with watch, torch.no_grad():
            tiny.encode(model, *args, **settings)
    finally:
        del state_of(model).method.feed_forward
    return seen[0], outputs[0]


def whole(model, x, out):
    """bool ``[B, n]``: where the sublayer gave its dense value."""
    state = state_of(model)
    with vk.use_ratio(model, 1), torch.no_grad():
        state.local.context = None
        dense = tiny.run(tiny.layers(model)[0], x)
    return (out - dense).abs().amax(-1) < 1e-5  # T5 norms in fp32


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


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_ones_is_the_dense_model(kind):
    model = tiny.patched("bert", "gelu").double()
    ids, mask = tiny.batch(11, 6)
    with torch.no_grad():
        with vk.use_ratio(model, 1):
            dense = tiny.encode(model, ids, mask)
        with vk.keep(model, torch.ones(ids.shape, dtype=kind)) as same:
            assert same is model
            got = tiny.encode(model, ids, mask)
        torch.testing.assert_close(got[mask == 1], dense[mask == 1])
        assert not torch.allclose(tiny.encode(model, ids, mask)[mask == 1], dense[mask == 1])


def test_the_mask_comes_on_top_of_ids_and_ends():
    model = tiny.patched(keep_first=1, keep=(5,), backend="reference").double()
    ids, mask = tiny.batch(11, 6)
    ids[ids == 5] = 6
    ids[0, 6] = 5
    extra = torch.zeros(2, 11, dtype=torch.bool)
    extra[1, 4] = extra[1, 9] = True  # the last is padding
    with vk.keep(model, extra):
        x, out = first_inputs(model, ids, mask)
    expected = extra | (ids == 5)
    expected[:, 0] = True
    assert torch.equal(whole(model, x, out) & mask.bool(), expected & mask.bool())


def encoded(model, ids, mask, kept):
    with vk.keep(model, kept), torch.no_grad():
        return tiny.encode(model, ids, mask)


def test_an_inner_block_replaces_the_outer_and_an_error_restores():
    model, (ids, mask) = tiny.patched(), tiny.batch(11, 6)
    one, two = torch.zeros(2, 2, 11, dtype=torch.bool)
    one[:, 3] = two[:, 4] = True
    a, b = encoded(model, ids, mask, one), encoded(model, ids, mask, two)
    assert not torch.equal(a, b)
    with vk.keep(model, one), torch.no_grad():
        with contextlib.suppress(KeyError), vk.keep(model, two):
            assert torch.equal(tiny.encode(model, ids, mask), b)
            raise KeyError
        assert torch.equal(tiny.encode(model, ids, mask), a)
        assert state_of(model).local.kept is not None
    assert state_of(model).local.kept is None
    assert not kept_masks.get()


def test_two_threads_and_two_tasks_keep_their_own():
    model, (ids, mask) = tiny.patched(), tiny.batch(11, 6)
    masks = torch.zeros(3, 2, 11, dtype=torch.bool)
    masks[0, :, 3] = masks[1, :, 4] = True
    alone = [encoded(model, ids, mask, kept) for kept in masks]
    got, meet = {}, threading.Barrier(3, timeout=30)

    def work(number):
        meet.wait()
        with vk.keep(model, masks[number]), torch.no_grad():
            meet.wait()
            got[number] = tiny.encode(model, ids, mask)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for number in range(3):
        assert torch.equal(got[number], alone[number])

    async def task(number):
        with vk.keep(model, masks[number]):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(tiny.encode(model, ids, mask), alone[number])

    async def tasks():
        await asyncio.gather(*map(task, range(3)))

    with torch.no_grad():
        asyncio.run(tasks())


def test_a_thread_started_inside_does_not_inherit():
    model, (ids, mask) = tiny.patched(), tiny.batch(11, 6)
    with torch.no_grad():
        plain = tiny.encode(model, ids, mask)
    seen = []

    def work():
        with torch.no_grad():
            seen.append(tiny.encode(model, ids, mask))

    with vk.keep(model, torch.ones(2, 11)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
    assert torch.equal(seen[0], plain)


def test_writing_to_the_mask_inside_changes_nothing():
    model, (ids, mask) = tiny.patched(), tiny.batch(11, 6)
    kept = torch.ones(2, 11, dtype=torch.bool)
    expected = encoded(model, ids, mask, kept)
    with vk.keep(model, kept), torch.no_grad():
        kept.zero_()
        assert torch.equal(tiny.encode(model, ids, mask), expected)


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_mask_of_another_shape(ratio):
    model, (ids, mask) = tiny.patched(ratio=ratio, keep=(5,)), tiny.batch(11, 6)
    for shape in ((2, 10), (1, 11), (2, 12), (11, 2)):
        refused = pytest.raises(ValueError, match=r"must have shape \[2, 11\].*got \[")
        with refused if ratio > 1 else contextlib.nullcontext():
            encoded(model, ids, mask, torch.ones(shape))
    encoded(model, ids, mask, torch.ones(2, 11))


BAD_MASKS = [
    (None, TypeError, "mask must be a torch.Tensor, got NoneType"),
    ([[1, 0]], TypeError, "mask must be a torch.Tensor, got list"),
    (torch.ones(4), ValueError, r"mask must have shape \[batch, length\], got \[4\]"),
    (torch.ones(2, 3, 1), ValueError, r"got \[2, 3, 1\]"),
    (torch.full((2, 3), 2), ValueError, "mask must be bool or hold 0 and 1"),
    (torch.full((2, 3), -1e9), ValueError, "mask must be bool or hold 0 and 1"),
    (torch.full((2, 3), float("nan")), ValueError, "mask must be bool or hold 0 and 1"),
    (torch.ones(2, 3, dtype=torch.complex64), ValueError, "mask must be bool or hold 0 and 1"),
]


@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS)
def test_refuses_what_is_no_mask(mask, error, message):
    model = tiny.patched()
    with pytest.raises(error, match=message), vk.keep(model, mask):
        raise AssertionError("inside")
    assert not kept_masks.get()
    with pytest.raises(ValueError, match="model is not patched"), vk.keep(tiny.model(), mask):
        raise AssertionError("inside")


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


def test_a_mask_does_not_go_into_programs():
    model, (ids, mask) = tiny.patched("bert", "gelu", keep_first=1), tiny.batch(11, 6)
    kept = torch.ones(2, 11)
    with vk.keep(model, kept), torch.no_grad():
        with pytest.raises(ValueError, match="does not go into an exported or traced program"):
            torch.export.export(model, (ids,), {"attention_mask": mask}, strict=False)
        with pytest.raises(ValueError, match="does not go into an exported or traced program"):
            torch.jit.trace(lambda ids, mask: tiny.encode(model, ids, mask), (ids, mask))
