"""CTranslate2 in a process of its own, which ``ctranslate.py`` starts.

In one process with PyTorch it shares libgomp, which then counts more threads than cores and lets
all of them sleep at every barrier: 128 tokens took MiniLM 1.6 times as long, in PyTorch and here.

Arguments: the model's folder, its compute type, the number of threads, a file of inputs. It answers
a line of JSON with name and shape of each output's shared memory (float32), then each line that it
reads, when the outputs are there, with another.
"""

import json
import sys
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import ctranslate2 as ct
import numpy as np


def main(path: str, compute_type: str, threads: str, file: str) -> None:
    encoder = ct.Encoder(path, "cpu", compute_type=compute_type, inter_threads=1,
                         intra_threads=int(threads))  # fmt: skip
    with np.load(file) as arrays:
        count = len(arrays.files) // 2
        inputs = [(arrays[f"ids{i}"], arrays[f"lengths{i}"]) for i in range(count)]
    given = [tuple(map(ct.StorageView.from_array, pair)) for pair in inputs]

    def run() -> list[Any]:
        return [np.asarray(encoder.forward_batch(*pair).last_hidden_state) for pair in given]

    found = run()
    blocks = [SharedMemory(create=True, size=out.nbytes) for out in found]
    shared = [
        np.ndarray(out.shape, np.float32, b.buf) for out, b in zip(found, blocks, strict=True)
    ]
    try:
        names = [(b.name, out.shape) for out, b in zip(found, blocks, strict=True)]
        print(json.dumps(names), flush=True)
        for _ in sys.stdin:
            for target, out in zip(shared, run(), strict=True):
                target[...] = out
            print("done", flush=True)
    finally:
        del shared
        for block in blocks:
            block.close()
            block.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
