"""No write to a weight is missed, by whatever way it came."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.ops.packed_cases import COLUMNS, ROWS, marks, product, same

pytestmark = marks


def whole(weight):
    weight.data = torch.randn_like(weight)


def row(weight):
    weight.data[37] = 3.0


def column(weight):
    weight.data[:, 5].add_(1)


def last(weight):
    weight.data[-1, -1] += 1


def first(weight):
    weight.data[0, 0] += 1


def numpy(weight):
    weight.detach().numpy()[11, 7] += 1


def dlpack(weight):
    torch.from_dlpack(weight.detach())[3] = 0.25


def buffer(weight):
    raw = (ctypes.c_char * weight.nbytes).from_address(weight.data_ptr())
    view = np.frombuffer(raw, dtype=np.float32)
    view[view.size // 2] += 1


def view_of_storage(weight):
    flat = torch.tensor([], dtype=weight.dtype).set_(weight.untyped_storage())
    flat[flat.numel() // 3] += 1


def set_storage(weight):
    other = torch.randn_like(weight)
    with torch.no_grad():
        weight.set_(other.untyped_storage(), 0, weight.shape, weight.stride())


def swap(weight):
    other = nn.Parameter(torch.randn_like(weight))
    torch.utils.swap_tensors(weight, other)


def no_grad(weight):
    with torch.no_grad():
        weight[19].mul_(2)


def optimiser(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def load(weight):
    holder = nn.ParameterDict({"w": weight})
    holder.load_state_dict({"w": torch.randn(weight.shape)})


def other_thread(weight):
    thread = threading.Thread(target=lambda: weight.data[2].add_(1))
    thread.start()
    thread.join()


def system_call(weight):
    """The kernel itself writes, as it does for readinto."""
    view = weight.detach().numpy().reshape(-1)[5000:9000]
    read, write = os.pipe()
    os.write(write, np.full(4000, 0.125, np.float32).tobytes())
    assert os.readv(read, [memoryview(view).cast("B")]) == 16000
    os.close(read)
    os.close(write)


def memory_file(weight):
    """As a debugger, or another process, would."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(weight.data_ptr() + weight.nbytes // 2)
        memory.write(np.float32(7.5).tobytes())


def tied(weight):
    """A transposed view in another layer."""
    weight.t().data[9] = 1.5


WRITES = [
    *(whole, row, column, last, first, numpy, dlpack, buffer, view_of_storage, set_storage, swap),
    *(no_grad, optimiser, load, other_thread, system_call, memory_file, tied),
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_is_noticed(write):
    weight = nn.Parameter(torch.randn(ROWS, COLUMNS))
    assert same(weight)
    before = product(weight).clone()
    write(weight)
    assert same(weight)
    assert not torch.equal(product(weight), before)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(WRITES), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_any_order_of_writes(writes, seed):
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(ROWS, COLUMNS))
    product(weight)
    for write in writes:
        write(weight)
        assert same(weight), write.__name__
