"""A switch of the instruction set while kernels run, or while weights are packed, changes nothing:
every call gives, bit for bit, what one of the sets gives alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.ops import attention_cases, cases
from variator_kernels import functional
from variator_kernels.ops import cpu_arguments, prepack
from variator_kernels.ops.adapter_decompress import cpu as decompress
from variator_kernels.ops.arguments import Norm
from variator_kernels.ops.group_merge import cpu as merge
from variator_kernels.ops.grouped_attention import cpu as attention
from variator_kernels.ops.grouped_attention.op import Attention, Visible
from variator_kernels.ops.make_groups import make_groups

pytestmark = pytest.mark.skipif(
    len(cases.ISAS) < 2, reason=f"needs two instruction sets, this machine has {cases.ISAS}"
)
D, F, R = 48, 64, 9


@pytest.fixture(autouse=True)
def restored():
    before = cases.CPU.active_isa()
    yield
    cases.CPU.set_isa(before)


class Job:
    """One input for every CPU kernel, and what each instruction set makes of it."""

    def __init__(self, dtype: torch.dtype, ratio: int) -> None:
        torch.manual_seed(ratio)
        self.name = f"{dtype}, ratio {ratio}"
        self.x, self.dy = (torch.randn(3, 37, D).to(dtype) for _ in range(2))
        self.plugin = cases.plugin(D, ratio, R, dtype)
        self.ffn = cases.feed_forward(D, F, dtype, "t5")
        self.groups = make_groups(self.x, ratio, backend="cpu")
        norm = Norm("rms", self.ffn.norm_weight, None, self.ffn.eps)
        self.merge = (self.x, self.plugin.merge, self.groups, norm)
        shape = (2, 40, 70, 4, 2, 24)
        self.qkv = attention_cases.qkv(shape, dtype)
        self.terms = attention_cases.options("t5 attention_kv", shape, ratio)
        self.decoding = attention_cases.qkv((2, 2, 600, 4, 2, 24), dtype)
        self.merged, self.projected, self.softmax = merge.group_merge(*self.merge)
        self.expected: list[list[tuple[Tensor, ...]]] = []
        for isa in cases.ISAS:
            cases.CPU.set_isa(isa)
            self.expected.append(list(self.calls()))

    def calls(self) -> Iterable[tuple[Tensor, ...]]:
        x, plugin, groups = self.x, self.plugin, self.groups
        yield (functional.compressed_ffn(x, plugin, self.ffn, backend="cpu"),)
        rounded = self.ffn._replace(precision="int8")
        with torch.no_grad():
            yield (functional.compressed_ffn(x, plugin, rounded, backend="cpu"),)
        yield merge.group_merge(*self.merge)
        gradients = (self.merged, self.projected, self.softmax)
        yield merge.group_merge_backward(*gradients, *self.merge)
        inputs = (self.merged, self.projected, plugin.adapter)
        yield (decompress.adapter_decompress(*inputs, x, groups),)
        yield decompress.adapter_decompress_backward(self.dy, *inputs, groups)
        yield (functional.grouped_attention(*self.qkv, backend="cpu", **self.terms),)
        yield (functional.grouped_attention(*self.decoding, backend="cpu"),)
        call = Attention(*self.qkv, Visible(), self.terms["relative"], 0.2)
        yield attention.grouped_attention_backward(self.qkv[0], call)

    def check(self) -> None:
        for i, outputs in enumerate(self.calls()):
            same = [all(map(torch.equal, outputs, each[i])) for each in self.expected]
            assert any(same), f"{self.name}: call {i} gives what no instruction set gives"


every_job = pytest.mark.parametrize("ratio", [4, 16])
every_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@every_job
@every_dtype
def test_a_switch_after_each_packing(monkeypatch, dtype, ratio):
    job, pack, switches = Job(dtype, ratio), cpu_arguments.pack, 0

    def pack_and_switch(*arguments, **settings):
        nonlocal switches
        packed = pack(*arguments, **settings)
        switches += 1
        cases.CPU.set_isa(cases.ISAS[switches % len(cases.ISAS)])
        return packed

    monkeypatch.setattr(cpu_arguments, "pack", pack_and_switch)
    for _ in cases.ISAS:
        job.check()
    assert switches


@every_job
@every_dtype
def test_a_switch_after_each_look_into_the_cache(monkeypatch, dtype, ratio):
    job, get = Job(dtype, ratio), prepack.cache.get

    def get_and_switch(*arguments):
        found = get(*arguments)
        at = cases.ISAS.index(cases.CPU.active_isa())
        cases.CPU.set_isa(cases.ISAS[(at + 1) % len(cases.ISAS)])
        return found

    monkeypatch.setattr(prepack.cache, "get", get_and_switch)
    for _ in cases.ISAS:
        job.check()


@pytest.mark.usefixtures("threads")
def test_a_thread_that_switches_while_others_run():
    jobs = [Job(dtype, ratio) for dtype in cases.DTYPES for ratio in (4, 16)]
    done, failures = threading.Event(), []

    def switch() -> None:
        while not done.is_set():
            for isa in cases.ISAS:
                cases.CPU.set_isa(isa)

    def run(jobs: list[Job]) -> None:
        try:
            for job in jobs * 4:
                job.check()
        except AssertionError as error:
            failures.append(str(error))

    switching = threading.Thread(target=switch)
    running = [threading.Thread(target=run, args=(part,)) for part in (jobs, jobs[::-1])]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (switching, *running):
            thread.start()
        for thread in running:
            thread.join()
    finally:
        done.set()
        switching.join()
        sys.setswitchinterval(interval)
    assert not failures


def test_an_unknown_set_is_refused():
    for call in (cases.CPU.set_isa, lambda isa: cases.CPU.Pack(isa, 0, False, 1, 0, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"set must be one of portable.*got avx1024"):
            call("avx1024")
