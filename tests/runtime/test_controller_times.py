"""Times of levels: the table, its file, and a real model's; threads and tasks."""

from __future__ import annotations

import asyncio
import threading
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import variator_kernels as vk
from tests.runtime.simulated import times
from tests.sites import tiny
from variator_kernels.runtime.controller_measure import measure
from variator_kernels.runtime.state import states

TABLE = vk.LevelTimes(
    ("1", "2"), (1, 4), (8, 16), (((1.0, 2.0), (3.0, 6.0)), ((0.5, 1.0), (2.0, 3.0)))
)


def test_reads_its_cells_and_between_them():
    assert [TABLE.predict(0, b, b * n) for b in (1, 4) for n in (8, 16)] == [1, 2, 3, 6]
    assert TABLE.predict(0, 1, 12) == pytest.approx(1.5)
    assert TABLE.predict(0, 2.5, 2.5 * 8) == pytest.approx(2)
    assert TABLE.predict(1, 2.5, 2.5 * 12) == pytest.approx((0.75 + 2.5) / 2)
    assert TABLE.predict(0, 8, 8 * 16) == pytest.approx(12)
    assert TABLE.predict(0, 8, 8 * 32) == pytest.approx(24)
    assert TABLE.predict(0, 1, 2) == 1


@given(st.floats(0.5, 40), st.floats(1, 200), st.floats(1, 2), st.floats(1, 2))
def test_more_never_takes_less(rows, length, more_rows, longer):
    table = times()
    least = table.predict(0, rows, rows * length)
    most = table.predict(0, rows * more_rows, rows * more_rows * length * longer)
    assert most >= least * (1 - 1e-9)


def test_a_file(tmp_path):
    TABLE.save(tmp_path / "t.json")
    assert vk.LevelTimes.load(tmp_path / "t.json") == TABLE
    with pytest.raises(FileNotFoundError, match="path must be a file of times"):
        vk.LevelTimes.load(tmp_path / "none")
    text = (tmp_path / "t.json").read_text()
    changes = {'"format": 1': '"format": 2', "6.0": "-1.0", '"rows"': '"lines"', "0.5,": ""}
    for broken in ("{", "[]", *(text.replace(old, new) for old, new in changes.items())):
        assert broken != text
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no times that can be read"):
            vk.LevelTimes.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "change",
    [{"rows": (4, 1)}, {"lengths": ()}, {"names": ("1", "1")}, {"names": ("1",)},
     {"seconds": (((1.0, 2.0),), ((1.0, 2.0),))}, {"rows": (0, 4)}],
)  # fmt: skip
def test_refuses(change):
    fields = {"names": TABLE.names, "rows": TABLE.rows, "lengths": TABLE.lengths}
    with pytest.raises(ValueError, match="must"):
        vk.LevelTimes(**{**fields, "seconds": TABLE.seconds, **change})


def test_measures_medians_by_its_clock():
    model, now = tiny.patched("bert"), [0.0]
    seen = []

    def inputs(rows, length):
        ids, mask = tiny.batch(*[length] * rows)
        return {"input_ids": ids, "attention_mask": mask}

    def forward(module, args, kwargs):
        rows, length = kwargs["input_ids"].shape
        level = states(model)[0].current().ratios[0]
        seen.append((rows, length, level))
        now[0] += rows * length / level + len(seen) % 3

    model.register_forward_pre_hook(forward, with_kwargs=True)
    table = measure(model, {"1": 1, "4": 4}, (2, 1), (8, 4), inputs, 3, lambda: now[0])
    assert table.rows == (1, 2) and table.lengths == (4, 8)
    for level, ratio in enumerate((1, 4)):
        for b in table.rows:
            for n in table.lengths:
                assert b * n / ratio <= table.predict(level, b, b * n) <= b * n / ratio + 2
    assert len(seen) == 2 * 2 * 2 * (2 + 3)
    seen.clear()
    short = measure(model, {"1": 1}, (1, 2), (4, 8), inputs, 1, lambda: now[0], most_tokens=8)
    assert {(b, n) for b, n, _ in seen} == {(1, 4), (1, 8), (2, 4)}
    assert short.seconds[0][1][1] == 2 * short.seconds[0][1][0]


def test_measuring_on_a_gpu_waits_for_it(monkeypatch):
    """Before and after each forward that is timed: a CPU model that says it is on a GPU."""
    model, seen = tiny.patched("bert"), []

    class There(nn.Module):
        def parameters(self, recurse=True):
            yield types.SimpleNamespace(device=torch.device("cuda", 1))

        def forward(self, **given):
            seen.append("ran")
            return self.model(**given)

    holder = There().eval()
    holder.model = model
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))

    def inputs(rows, length):
        ids, mask = tiny.batch(*[length] * rows)
        return {"input_ids": ids, "attention_mask": mask}

    measure(holder, {"1": 1}, (1,), (4,), inputs, 2)
    assert seen[-6:] == ["cuda:1", "ran", "cuda:1"] * 2


def test_a_profile_is_measured_once(tmp_path):
    model, path = tiny.patched("bert"), tmp_path / "profile.json"
    given = {"levels": (1, 2), "rows": (1, 2), "lengths": (8,), "profile": path}
    first = vk.RatioController(model, target_seconds=1, **given)
    written = path.read_bytes()
    second = vk.RatioController(model, target_seconds=2, **given)
    assert first.times == second.times == vk.LevelTimes.load(path)
    assert path.read_bytes() == written
    with pytest.raises(ValueError, match="profile must hold the levels"):
        vk.RatioController(model, target_seconds=1, **given | {"levels": (1, 4)})


@pytest.fixture
def served():
    """A controller that alternates, and what each level answers to each input."""
    model = tiny.patched("bert")
    controller = vk.RatioController(
        model, target_seconds=1, levels=(1, 2, 4), profile=times(("1", "2", "4"), (1, 2, 3))
    )
    inputs = [tiny.batch(9, seed=i) for i in range(6)]
    with torch.no_grad():
        wanted = {}
        for name, level in controller.levels.items():
            with vk.use_ratio(model, level):
                wanted[name] = [model(ids, mask).last_hidden_state for ids, mask in inputs]
    return controller, inputs, wanted


def test_threads(served):
    controller, inputs, wanted = served
    wrong = []

    @torch.no_grad()
    def work(number):
        for i in range(20):
            ask = (None, "1", "2", "4")[(i + number) % 4]
            ticket = controller.arrive(9, ask)
            with controller.batch([ticket]) as choice:
                ids, mask = inputs[i % 6]
                got = controller.model(ids, mask).last_hidden_state
            if not torch.equal(got, wanted[choice.name][i % 6]) or ask not in (None, choice.name):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and controller.status()["waiting_requests"] == 0
    assert controller.status()["running_batches"] == 0


def test_tasks_of_one_loop(served):
    controller, inputs, wanted = served

    async def work(number):
        for i in range(10):
            ticket = controller.arrive(9, ("1", "2", "4")[(i + number) % 3])
            await asyncio.sleep(0)
            with controller.batch([ticket]) as choice:
                await asyncio.sleep(0)  # others enter and leave their batches meanwhile
                ids, mask = inputs[i % 6]
                with torch.no_grad():
                    got = controller.model(ids, mask).last_hidden_state
            assert torch.equal(got, wanted[choice.name][i % 6])

    async def all_of_them():
        await asyncio.gather(*(work(number) for number in range(4)))

    asyncio.run(all_of_them())
    assert controller.status()["running_batches"] == 0
