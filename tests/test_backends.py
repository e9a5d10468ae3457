"""Which backend is chosen, and that a kernel which never ran on a GPU is not."""

from __future__ import annotations

import types

import pytest
import torch

from bench.internals import state
from tests.sites import tiny
from variator_kernels import backends, cuda_support, extension
from variator_kernels.ops import grouped_attention


def status_of(name):
    return next(status for status in backends.status() if status.name == name)


def on_a_gpu(monkeypatch, arch=(9, 0)):
    """As on a machine with one; returns something that claims to be a tensor there."""
    monkeypatch.setattr(backends, "_INTERPRETER", False)
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    properties = types.SimpleNamespace(major=arch[0], minor=arch[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


def test_auto_does_not_pick_what_never_ran(monkeypatch):
    x = on_a_gpu(monkeypatch)
    monkeypatch.setattr(backends, "_PROVEN", [])
    assert backends.resolve("auto", x) == "reference"
    assert backends.resolve("triton", x) == "triton"
    assert status_of("triton").usable
    assert "never run on a GPU: 'auto' does not pick it" in status_of("triton").detail


def test_auto_picks_what_ran_on_that_architecture(monkeypatch):
    x = on_a_gpu(monkeypatch)
    monkeypatch.setattr(backends, "_PROVEN", [{"backend": "triton", "arch": "sm_90"}])
    assert backends.resolve("auto", x) == "triton"
    assert "'auto' picks it there" in status_of("triton").detail
    x.dtype = torch.float64
    assert backends.resolve("auto", x) == "reference"
    assert backends.resolve("auto", on_a_gpu(monkeypatch, (8, 0))) == "reference"


def cuda_kernels_for(monkeypatch, architectures):
    """As where the CUDA kernels were compiled for these."""
    monkeypatch.setattr(cuda_support, "_WHY_NO_LAUNCH", None)
    monkeypatch.setattr(cuda_support, "EMULATED", False)
    monkeypatch.setattr(cuda_support, "_ARCHITECTURES", architectures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize(
    ("proofs", "chosen"),
    [
        ([], "reference"),
        (["cuda"], "cuda"),
        (["triton"], "triton"),
        (["cuda", "triton"], "cuda"),  # the faster stands first
        (["triton", "cuda"], "triton"),
    ],
)
def test_auto_asks_each_gpu_backend_for_its_own_proof(monkeypatch, proofs, chosen):
    x = on_a_gpu(monkeypatch)
    cuda_kernels_for(monkeypatch, "90a-real")
    rows = [{"backend": backend, "arch": "sm_90"} for backend in proofs]
    rows.append({"backend": "cuda", "arch": "sm_80"})
    monkeypatch.setattr(backends, "_PROVEN", rows)
    assert backends.resolve("auto", x) == chosen


def test_auto_goes_on_where_a_proven_backend_cannot_run(monkeypatch):
    x = on_a_gpu(monkeypatch)
    cuda_kernels_for(monkeypatch, "80-real")
    rows = [{"backend": backend, "arch": "sm_90"} for backend in ("cuda", "triton")]
    monkeypatch.setattr(backends, "_PROVEN", rows)
    assert backends.resolve("auto", x) == "triton"
    assert "'auto' picks it there" in status_of("cuda").detail


@pytest.mark.parametrize(
    ("proofs", "chosen"),
    [(["cuda"], "reference"), (["cuda", "triton"], "triton"), (["triton"], "triton")],
)
def test_an_op_without_cuda_kernels_takes_the_next_proven_backend(monkeypatch, proofs, chosen):
    x = on_a_gpu(monkeypatch)
    cuda_kernels_for(monkeypatch, "90a-real")
    rows = [{"backend": backend, "arch": "sm_90"} for backend in proofs]
    monkeypatch.setattr(backends, "_PROVEN", rows)
    x.shape, x.requires_grad = torch.Size([1, 8, 2, 16]), False
    monkeypatch.setattr(grouped_attention, "fitting", lambda asked, chosen: chosen)
    assert grouped_attention._backend("auto", x, None, 0.0) == chosen


SM_90 = [
    {"backend": "triton", "arch": "sm_90"},
    {"backend": "cuda", "arch": "sm_90", "from_tokens": 1024},
    {"backend": "triton", "arch": "sm_90", "from_tokens": 4096},
]
OF_ANOTHER = {"backend": "cuda", "arch": "sm_80", "from_tokens": 8}


@pytest.mark.parametrize(
    ("tokens", "order"),
    [(0, "triton cuda"), (1023, "triton cuda"), (1024, "cuda triton"), (4095, "cuda triton"),
     (4096, "triton cuda"), (10**6, "triton cuda")],
)  # fmt: skip
def test_auto_picks_by_the_number_of_tokens(monkeypatch, tokens, order):
    x = on_a_gpu(monkeypatch)
    cuda_kernels_for(monkeypatch, "90a-real")
    monkeypatch.setattr(backends, "_PROVEN", [OF_ANOTHER, *SM_90])
    x.shape, x.numel = torch.Size([1, tokens, 768]), lambda: tokens * 768
    assert backends._proven_for(x) == order.split()
    assert backends.resolve("auto", x) == order.split()[0]
    assert backends.proven_on("triton") == ["sm_90"]


def test_a_weight_has_no_number_of_tokens(monkeypatch):
    """``patch`` and ``describe`` ask with one."""
    on_a_gpu(monkeypatch)
    for shape in ((3072, 768), (8,), ()):
        weight = torch.nn.Parameter(torch.empty(shape))
        assert backends._in_order(SM_90, weight) == ["triton", "cuda"]


def test_below_every_proven_size_the_file_order_holds(monkeypatch):
    x = on_a_gpu(monkeypatch)
    x.shape, x.numel = torch.Size([1, 5, 8]), lambda: 40
    monkeypatch.setattr(backends, "_PROVEN", [SM_90[2], SM_90[1]])
    assert backends._proven_for(x) == ["triton", "cuda"]


def test_without_proofs_no_size_is_looked_at(monkeypatch):
    x = on_a_gpu(monkeypatch)  # it has neither a shape nor a number of elements
    for proven in ([], [{"backend": "triton", "arch": "sm_90"}]):
        monkeypatch.setattr(backends, "_PROVEN", proven)
        assert backends.resolve("auto", x) == ("triton" if proven else "reference")
        assert backends.sizes_reached(x) == len(proven)


def test_a_choice_by_tokens_compiles_whole(monkeypatch):
    """Rows as on a GPU, the tensor on the CPU: one graph for each side of a threshold."""
    monkeypatch.setattr(backends, "_why_not_cpu", lambda x: "as on a GPU")
    monkeypatch.setattr(backends, "_why_not", lambda name, x, double: None)
    monkeypatch.setattr(backends, "_proven_for", lambda x: backends._in_order(SM_90, x))
    compiled = torch.compile(
        lambda x: x + {"triton": 1, "cuda": 2}[backends.resolve("auto", x)],
        backend="eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for tokens, added in ((8, 1), (2048, 2), (2000, 2), (5000, 1), (9, 1)):
        assert compiled(torch.zeros(2, tokens // 2, 3))[0, 0, 0] == added, tokens


def test_a_plugin_chooses_anew_for_another_number_of_tokens(monkeypatch):
    """It keeps what it chose from call to call."""
    model = tiny.patched(ratio=2)
    plugin, layer = model.encoder.block[0].layer[-1].plugins["2"], tiny.layers(model)[0]
    config, asked = state(model).method.config, []
    monkeypatch.setattr(backends, "_PROVEN", SM_90)
    monkeypatch.setattr(backends, "resolve", lambda name, x: asked.append(len(x[0])) or "reference")
    ffn = layer.feed_forward()
    for tokens in (8, 9, 1024, 1025, 4096, 9):
        plugin.prepared.of(plugin, ffn, torch.zeros(1, tokens, 24), config)
    assert asked == [8, 1024, 4096, 9]


def test_an_explicit_choice_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_INTERPRETER", False)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .* expected cuda"):
        backends.resolve("triton", torch.zeros(1))
    x = on_a_gpu(monkeypatch)
    why = backends._why_no_triton("3.2.0+rocm")
    monkeypatch.setattr(backends, "_WHY_NO_TRITON", why)
    with pytest.raises(ValueError, match=r"3.2.0\+rocm is installed, 3.6 or newer is needed"):
        backends.resolve("triton", x)
    assert not status_of("triton").usable
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: .* expected cpu"):
        backends.resolve("cpu", x)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.1+git12ab"])
def test_versions_of_triton_that_will_do(version):
    assert backends._why_no_triton(version) is None


@pytest.mark.parametrize("version", [None, "2.2.0", "3.5.1", "unknown"])
def test_versions_of_triton_that_will_not_do(version):
    assert "3.6 or newer is needed" in backends._why_no_triton(version)


@pytest.mark.parametrize(("driver", "why"), [(12080, "supports CUDA 12.8"), (0, ""), (13010, "")])
def test_importing_leaves_the_gpu_alone(monkeypatch, driver, why):
    """What is asked at import must not initialise CUDA: a fork would be without it."""

    def initialises(*_):
        raise AssertionError("CUDA was initialised")

    module = types.SimpleNamespace(emulated=False, architectures="90a-real", runtime_version=13000)
    monkeypatch.setitem(extension._LOADED, "cuda", (module, ""))
    monkeypatch.setattr(cuda_support, "_driver_version", lambda: driver)
    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, initialises)
    assert why in (cuda_support._why_no_launch() or "")


def test_the_cuda_kernels_say_why_not(monkeypatch):
    x = on_a_gpu(monkeypatch, (10, 0))
    cuda_kernels_for(monkeypatch, "90a-real")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    with pytest.raises(ValueError, match=r"the GPU is sm_100, .* built for 90a-real"):
        backends.resolve("cuda", x)
    assert not status_of("cuda").usable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no GPU" in status_of("cuda").detail
    with pytest.raises(ValueError, match="expected cuda"):
        backends.resolve("cuda", torch.zeros(1, dtype=torch.bfloat16))


def test_the_record_of_proofs_is_whole():
    for row in backends._PROVEN:
        assert row["backend"] in ("triton", "cuda")
        assert {"arch", "gpu", "torch", "triton", "commit"} <= row.keys()
