"""Packed weights where memory is shared, lost or replaced, and where others look first."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import threading

import numpy as np
import pytest
import torch

from tests.ops.packed_cases import COLUMNS, ROWS, marks, product, same
from variator_kernels import extension
from variator_kernels.ops import packed
from variator_kernels.ops.packed import PackCache, cache

pytestmark = marks
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = os.sysconf("SC_PAGESIZE")
READ_WRITE, PRIVATE_ANONYMOUS, FIXED = 3, 0x22, 0x10
DONT_NEED, HUGE_PAGE, NO_HUGE_PAGE = 4, 14, 15


def new_memory(address, size):
    """Zeros in place of what is mapped there."""
    flags = PRIVATE_ANONYMOUS | FIXED
    assert LIBC.mmap(address, size, READ_WRITE, flags, -1, 0) == address


@pytest.fixture
def mapped():
    """A weight [256, 256] in a mapping of its own."""
    address = LIBC.mmap(None, 1 << 18, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    raw = (ctypes.c_float * (1 << 16)).from_address(address)
    weight = torch.frombuffer(raw, dtype=torch.float32).view(256, 256)
    weight.normal_()
    yield weight
    cache.forget([weight, weight[:128]])
    LIBC.munmap(address, 1 << 18)


@pytest.mark.parametrize("first", ["view", "base"])
def test_a_write_before_the_other_is_packed(first):
    """Who begins to track pages takes away the marks that others have not seen."""
    base = torch.randn(2 * ROWS, COLUMNS)
    pair = base[ROWS:], base
    one, other = pair if first == "view" else pair[::-1]
    product(one)
    base.numpy()[ROWS + 100] = 1.0
    product(other)
    assert same(one) and same(other)


def test_a_base_that_lost_memory_leaves_marks_to_its_views(mapped):
    view = mapped[:128]
    product(view), product(mapped)
    mapped.numpy()[5] = 1.0
    new_memory(mapped.data_ptr() + 40 * PAGE, 4 * PAGE)
    product(mapped)
    assert same(view) and same(mapped)


@pytest.mark.parametrize("pages", [(0, 64), (10, 4)], ids=["all", "some"])
@pytest.mark.parametrize("how", ["dropped", "dropped and read", "new", "new and written"])
def test_memory_that_loses_what_it_held(mapped, pages, how):
    product(mapped)
    at, size = mapped.data_ptr() + pages[0] * PAGE, pages[1] * PAGE
    if how.startswith("new"):
        new_memory(at, size)
    else:
        assert LIBC.madvise(at, size, DONT_NEED) == 0
    if how.endswith("read"):
        assert mapped.sum().isfinite()
    if how.endswith("written"):
        mapped.numpy()[45] = 3.0
    assert same(mapped)
    mapped.numpy()[50] = 2.0
    assert same(mapped)


@pytest.mark.parametrize("large_pages", [False, True])
@pytest.mark.parametrize("then", ["", "read", "written"])
def test_a_whole_table_of_pages_that_is_gone(large_pages, then):
    """The kernel may take the table away with its pages, and then has no page to tell of; Linux
    6.18.44 tells all the same."""
    table = PAGE // 8 * PAGE
    size = 4 * table
    address = LIBC.mmap(None, size, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    LIBC.madvise(address, size, HUGE_PAGE if large_pages else NO_HUGE_PAGE)
    values = np.frombuffer((ctypes.c_char * size).from_address(address), np.float32)
    weight = torch.from_numpy(values.reshape(-1, 1024))
    weight.fill_(1.0)

    def kept():
        return cache.get((weight,), "copy", lambda copy: copy)

    assert torch.equal(kept(), weight)
    first = (address + table - 1) // table * table
    assert LIBC.madvise(first, 2 * table, DONT_NEED) == 0
    if then == "written":
        weight[len(weight) // 2, 3] = 5.0
    if then == "read":
        assert weight.sum() < weight.numel()
    for value in (2.0, 3.0):
        assert torch.equal(kept(), weight) and (weight == 0).any()
        weight[len(weight) // 2, 7] = value
    assert torch.equal(kept(), weight)
    cache.forget([weight])


def copied_map(path):
    """As safetensors maps a file: what this process writes stays its own."""
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(ROWS, COLUMNS)))


@pytest.mark.parametrize("how", ["rewritten", "dropped"])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_shows_through_again(tmp_path, how, read_before):
    """Truncating a file takes even this process's own copies of its pages."""
    path = tmp_path / "w"
    np.random.randn(ROWS, COLUMNS).astype(np.float32).tofile(path)
    weight = copied_map(path)
    product(weight)
    if how == "rewritten":
        np.full((ROWS, COLUMNS), 3.5, np.float32).tofile(path)
    else:
        assert LIBC.madvise(weight.data_ptr(), weight.nbytes // PAGE * PAGE, DONT_NEED) == 0
    if read_before:
        assert weight.sum().isfinite()
    assert same(weight)
    for value in (2.5, 1.5):
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(np.full(5000, value, np.float32).tobytes())
        assert same(weight)


def test_a_write_before_freezing():
    weight = torch.randn(ROWS, COLUMNS)
    product(weight)
    for value in (1.0, 2.0):  # the second promise holds from the second call on
        weight.numpy()[3] = value
        cache.freeze([weight])
        assert same(weight)
    cache.thaw([weight])


def test_a_value_that_was_there_only_while_it_was_packed(monkeypatch):
    """Another thread takes a neuron out for a moment, and puts it back."""
    weight, packs = torch.zeros(ROWS, COLUMNS), PackCache(cache.track)
    original = packed._copied

    def copied(source):
        weight.numpy()[60] = 1.0
        copy = original(source)
        weight.numpy()[60] = 0.0
        return copy

    monkeypatch.setattr(packed, "_copied", copied)
    packs.get((weight,), "copy", lambda copy: copy)
    monkeypatch.setattr(packed, "_copied", original)
    assert not packs.get((weight,), "copy", lambda copy: copy).any()


def test_a_negated_view():
    """It has the address, the shape and the strides of what it negates."""
    weight = torch.randn(ROWS, COLUMNS)
    product(weight)
    assert same(torch._neg_view(weight)) and same(weight)


@pytest.mark.slow  # AddressSanitizer's allocator does not survive a fork beside other threads
def test_a_thread_that_forks_while_others_look():
    """No product is made: oneDNN's locks do not survive such a fork either."""
    weights = [torch.randn(512, 512) for _ in range(4)]
    packs, stop = PackCache(cache.track), threading.Event()

    def copied(weight):
        return packs.get((weight,), "copy", lambda copy: copy.numpy().copy())

    def same(weight):
        return np.array_equal(copied(weight), weight.numpy())

    assert all(map(same, weights))

    def look():
        while not stop.is_set():
            for weight in weights:
                weight.numpy()[7] += 1
                copied(weight)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # better dead than waited for
            torch.set_num_threads(1)
            weights[0].numpy()[9] = 4.0
            os._exit(0 if all(map(same, weights)) else 1)
        codes.append(os.waitpid(child, 0)[1])
    stop.set()
    for thread in threads:
        thread.join()
    assert not any(codes) and all(map(same, weights))


def in_child(run):
    """The exit status of a forked child that runs ``run()``."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # better dead than waited for
        status = 255
        try:
            torch.set_num_threads(1)
            status = int(run() or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_descriptors_that_somebody_closed(tmp_path, rule):
    """As a daemon does, whose own files have their numbers afterwards."""
    weight = torch.randn(ROWS, COLUMNS)

    def daemon():
        product(weight)
        os.closerange(3, 4096)
        files = [os.open(tmp_path / str(i), os.O_CREAT | os.O_WRONLY) for i in range(50)]
        weight.numpy()[4] = 1.0
        if not same(weight) or cache.rules([weight]) != {rule: weight.nbytes}:
            return 1
        weight.numpy()[5] = 1.0
        if not same(weight):
            return 2
        return in_child(lambda: sum(os.write(file, b"x") for file in files) != 50)

    assert in_child(daemon) == 0


def test_no_descriptor_is_free_for_a_while(rule):
    weight, later = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)

    def run():
        os.closerange(3, 4096)
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(13)]
        why = extension.load().why_not_tracked()
        if not same(weight) or why != "no file descriptor is free":
            return 1
        weight.numpy()[4] = 1.0
        if not same(weight):
            return 2
        for file in files:
            os.close(file)
        return not same(later) or cache.rules([later]) != {rule: later.nbytes}

    assert in_child(run) == 0


def test_a_new_weight_is_compared_with_no_others(monkeypatch):
    """Thousands of models would take minutes."""
    packs, asked, moved = PackCache(cache.track), [], packed.moved
    monkeypatch.setattr(packed, "moved", lambda *of: asked.append(of) or moved(*of))
    weights, shared = [torch.randn(4) for _ in range(50)], torch.randn(4)
    for weight in weights:
        packs.get((weight, weight[1:]), "copy", lambda *copies: copies)
    assert not asked
    for weight in weights:
        packs.get((weight, shared), "copy", lambda *copies: copies)
    packs.forget(weights[:10])
    asked.clear()
    del weights, weight
    gc.collect()
    assert not packs._entries.all and not packs._entries.keys


def test_memory_that_was_frozen_for_another():
    """A promise is of a tensor's storage, not of whatever comes to lie at its address."""
    raw = torch.randn(ROWS, COLUMNS).numpy()
    frozen, other = torch.from_numpy(raw), torch.from_numpy(raw)
    cache.freeze([frozen])
    product(frozen)
    raw[3] = 1.0
    assert same(other)
    raw[4] = 1.0
    assert same(other)


def test_a_promise_ends_with_the_tensor_it_was_made_of():
    raw = torch.randn(ROWS, COLUMNS).numpy()
    frozen, other = torch.from_numpy(raw), torch.from_numpy(raw)
    product(other)
    cache.freeze([frozen])
    del frozen
    gc.collect()
    raw[3] = 1.0
    assert same(other)
