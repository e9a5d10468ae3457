"""CTranslate2's arms run in a process of their own."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers import ctranslate

FAKE = """
import numpy as np

class StorageView:
    from_array = staticmethod(lambda array: array)

class Encoder:
    def __init__(self, path, device, compute_type, inter_threads, intra_threads):
        if compute_type not in ("float32", "int8"):
            raise ValueError(f"unknown compute type {compute_type}")
        self.calls = 0

    def forward_batch(self, ids, lengths):
        self.calls += 1
        class Found:
            last_hidden_state = (ids[..., None] + np.arange(3) + 100 * self.calls).astype("float32")
        return Found
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two batches of unequal size, for a stand-in of the runtime."""
    (tmp_path / "ctranslate2.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    lengths = {"lengths0": np.array([4, 4], np.int32), "lengths1": np.array([7], np.int32)}
    ids = {"ids0": np.arange(8).reshape(2, 4), "ids1": np.arange(7)[None]}
    return {name: array.astype(np.int32) for name, array in {**ids, **lengths}.items()}


def test_each_call_gives_what_the_other_process_computed(inputs: dict[str, np.ndarray]) -> None:
    apart = ctranslate._Apart("a folder", "int8", inputs)
    process = apart.process
    first, second = apart(), apart()
    expected = (
        torch.arange(8).view(2, 4, 1) + torch.arange(3) + 300
    )  # its own first call, 2 batches
    assert torch.equal(first[0], expected.float()) and first[1].shape == (1, 7, 3)
    assert torch.equal(second[0], first[0] + 200)
    del apart
    gc.collect()
    assert process.poll() == 0


def test_what_fails_there_is_said_here(inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(RuntimeError, match="unknown compute type int4"):
        ctranslate._Apart("a folder", "int4", inputs)
