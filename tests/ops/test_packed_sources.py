"""Whatever memory a weight has, and whoever shares it: no write is missed."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ops.packed_cases import COLUMNS, ROWS, marks, product, same
from variator_kernels.ops.packed import cache

pytestmark = marks


def made(kind, tmp_path):
    values = torch.randn(ROWS, COLUMNS)
    if kind == "transposed":
        return values.t().contiguous().t()
    if kind == "slice":
        return torch.randn(ROWS, 2 * COLUMNS)[:, ::2]
    if kind == "offset":  # begins and ends inside of pages
        return torch.randn(ROWS * COLUMNS + 999)[333 : 333 + ROWS * COLUMNS].view(ROWS, COLUMNS)
    if kind == "file":
        save_file({"w": values}, tmp_path / "w.safetensors")
        return load_file(tmp_path / "w.safetensors")["w"]
    if kind == "memmap":
        return torch.from_numpy(np.memmap(tmp_path / "w", np.float32, "w+", shape=(ROWS, COLUMNS)))
    if kind == "copied memmap":
        values.numpy().tofile(tmp_path / "w")
        return torch.from_numpy(np.memmap(tmp_path / "w", np.float32, "c", shape=(ROWS, COLUMNS)))
    if kind == "shared":
        return values.share_memory_()
    if kind == "inference":
        with torch.inference_mode():
            return torch.randn(ROWS, COLUMNS)
    return values


@pytest.mark.parametrize(
    "kind",
    ["transposed", "slice", "offset", "file", "memmap", "copied memmap", "shared", "inference"],
)
def test_wherever_the_memory_comes_from(kind, tmp_path):
    weight = made(kind, tmp_path)
    assert same(weight)
    for i, j in ((0, 0), (ROWS - 1, COLUMNS - 1), (ROWS // 2, 3)):
        weight.detach().numpy()[i, j] += 1
        assert same(weight)


@pytest.mark.parametrize("kind", ["file", "memmap", "copied memmap"])
def test_a_file_that_somebody_writes_to(kind, tmp_path):
    """What is mapped from it may change, or not; what is packed agrees with it."""
    weight = made(kind, tmp_path)
    product(weight)
    (path,) = tmp_path.iterdir()
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(np.full(5000, 2.5, np.float32).tobytes())
    assert same(weight)


def test_memory_shared_with_another_process(rule):
    weight = torch.randn(ROWS, COLUMNS).share_memory_()
    product(weight)
    assert cache.rules([weight]) == {"read": weight.nbytes}
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # better dead than waited for
        weight.numpy()[50] = 4.0
        os._exit(0)
    os.waitpid(child, 0)
    assert weight[50, 0] == 4 and same(weight)


def test_forked_children_look_for_themselves():
    weight, other = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    product(weight), product(other)
    weight.numpy()[3] = 1.0  # nobody looked yet
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # better dead than waited for
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        right = same(weight) and same(other)
        other.numpy()[50] = 4.0
        os._exit(0 if right and same(other) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(weight) and same(other)
    other.numpy()[51] = 4.0
    assert same(other)


def test_a_view_and_its_base_learn_of_it_both():
    """Whoever looks first takes the kernel's marks away."""
    base = torch.randn(2 * ROWS, COLUMNS)
    half = base[ROWS:]
    product(base), product(half)
    half.numpy()[100] = 1.0
    assert same(half) and same(base)
    base.numpy()[-1] = 1.0
    assert same(base) and same(half)


def test_freed_memory_that_others_use():
    for _ in range(20):
        weight = torch.randn(ROWS, COLUMNS)
        assert same(weight)
        del weight


def test_two_threads_and_one_writer():
    """Every call that begins after a write sees it, in all threads."""
    weight = torch.zeros(ROWS, COLUMNS)
    found, rounds = [], 60
    barrier = threading.Barrier(3)

    def read():
        for i in range(rounds):
            barrier.wait()
            found.append(bool((product(weight) == i).all()))
            barrier.wait()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(rounds):
        weight.numpy()[:] = i
        barrier.wait()
        barrier.wait()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * rounds and all(found)
