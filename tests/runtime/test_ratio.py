"""set_ratio and use_ratio: state, contexts, threads, tasks."""

import asyncio
import threading

import pytest
import torch

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.runtime.state import overrides


@pytest.fixture
def model():
    return tiny.patched(ratios=(2, 3, 4))


def active(model):
    return model.encoder.variator_state.current().uniform


def outputs(model, ratios=(1, 2, 3, 4)):
    ids, mask = tiny.batch(9, 4)
    out = {}
    for k in ratios:
        vk.set_ratio(model, k)
        with torch.no_grad():
            out[k] = tiny.encode(model, ids, mask)
    vk.set_ratio(model, 4)
    return ids, mask, out


def test_every_ratio_is_another_function(model):
    _, _, out = outputs(model)
    for a in out:
        for b in out:
            assert (a == b) == torch.allclose(out[a], out[b], atol=1e-3)


def test_nested_contexts_and_errors_restore(model):
    with vk.use_ratio(model, 2) as same:
        assert same is model
        with pytest.raises(KeyError), vk.use_ratio(model, 3):
            assert active(model) == 3
            vk.set_ratio(model, 1)
            assert active(model) == 3
            raise KeyError
        assert active(model) == 2
        assert model.encoder.variator_state.local.override.uniform == 2
    assert active(model) == 1
    assert model.encoder.variator_state.local.override is None
    assert not overrides.get()


def test_models_do_not_see_each_others_ratio(model):
    other = tiny.patched()
    with vk.use_ratio(model, 2), vk.use_ratio(other, 1):
        assert (active(model), active(other)) == (2, 1)
    assert (active(model), active(other)) == (4, 4)


def test_a_module_that_holds_several_models(model):
    both = torch.nn.ModuleList([model, tiny.patched()])
    vk.set_ratio(both, 2)
    assert [active(m) for m in both] == [2, 2]
    with pytest.raises(ValueError, match="got 3"):
        vk.set_ratio(both, 3)
    assert [active(m) for m in both] == [2, 2]


BAD = [
    (5, r"ratio must be 1 \(dense\) or one that has plugins, \(2, 3, 4\), got 5"),
    (0, "ratio must be >= 1, got 0"),
    (-2, "ratio must be >= 1, got -2"),
    (float("nan"), "ratio must be an integer >= 1, got nan"),
    (float("inf"), "ratio must be an integer >= 1, got inf"),
    (2.5, "ratio must be an integer >= 1, got 2.5"),
    (True, "ratio must be an integer >= 1, got True"),
    (None, "ratio must be an integer >= 1, got None"),
    ("2", "ratio must be an integer >= 1, got '2'"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_refuses_bad_ratios(model, value, message):
    with pytest.raises(ValueError, match=message):
        vk.set_ratio(model, value)
    with pytest.raises(ValueError, match=message), vk.use_ratio(model, value):
        pass
    assert active(model) == 4


def test_refuses_unpatched_models():
    with pytest.raises(ValueError, match="model is not patched"):
        vk.set_ratio(tiny.model(), 2)
    with pytest.raises(ValueError, match="model is not patched"), vk.use_ratio(tiny.model(), 2):
        pass
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        vk.set_ratio(None, 2)


def test_threads(model):
    ids, mask, expected = outputs(model)
    barrier = threading.Barrier(3)
    wrong = []

    def work(k):
        with vk.use_ratio(model, k), torch.no_grad():
            for _ in range(8):
                barrier.wait(30)
                if not torch.equal(tiny.encode(model, ids, mask), expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert active(model) == 4


def test_asyncio_tasks(model):
    ids, mask, expected = outputs(model)

    async def work(k, pauses):
        with vk.use_ratio(model, k):
            for _ in range(pauses):
                await asyncio.sleep(0)
                with torch.no_grad():
                    assert torch.equal(tiny.encode(model, ids, mask), expected[k])

    async def everything():
        await asyncio.gather(work(1, 3), work(2, 5), work(3, 2))

    asyncio.run(everything())
    assert active(model) == 4
    assert model.encoder.variator_state.local.override is None


def test_a_forward_keeps_the_ratio_it_began_with(model):
    ids, mask, expected = outputs(model)
    handle = model.encoder.block[0].register_forward_hook(lambda *_: vk.set_ratio(model, 2))
    with torch.no_grad():
        assert torch.equal(tiny.encode(model, ids, mask), expected[4])
    handle.remove()
    assert active(model) == 2
