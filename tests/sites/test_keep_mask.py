"""vk.keep: a mask of tokens that stay whole, in a block."""

import asyncio
import contextlib
import threading

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from tests.sites.keep_cases import first_inputs, state_of, whole
from variator_kernels.runtime.state import kept_masks


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


def test_a_mask_does_not_go_into_programs():
    model, (ids, mask) = tiny.patched("bert", "gelu", keep_first=1), tiny.batch(11, 6)
    kept = torch.ones(2, 11)
    with vk.keep(model, kept), torch.no_grad():
        with pytest.raises(ValueError, match="does not go into an exported or traced program"):
            torch.export.export(model, (ids,), {"attention_mask": mask}, strict=False)
        with pytest.raises(ValueError, match="does not go into an exported or traced program"):
            torch.jit.trace(lambda ids, mask: tiny.encode(model, ids, mask), (ids, mask))
