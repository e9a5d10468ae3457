"""Which Triton kernels a sublayer or an attention needs, by name; the tests compare with these."""

from __future__ import annotations

import importlib
import pkgutil

from variator_kernels import triton_kernels

ATTENTION = {"attention_kernel", "query_gradient_kernel", "key_gradient_kernel"}
SUBLAYER = {
    "group_merge_kernel", "adapter_decompress_kernel", "score_gradient_kernel",
    "merge_backward_kernel", "weight_sums_kernel", "inner_gradient_kernel",
    "group_gradient_kernel",
}  # fmt: skip


def sublayer_kernels(model: str, k: int, dtype: str = "bf16") -> set[str]:
    """Of forward and backward passes of a model of ``triton_cases.MODELS``."""
    found = set(SUBLAYER)
    if dtype != "fp32":  # products of fp32 are PyTorch's
        found.add("linear_kernel")
    if k > 8:  # a merge in parts, whose scores are added up
        found.add("weighted_sum_kernel")
    if model == "bert-base":  # a norm behind the residual
        found.add("row_norm_kernel")
    return found


def all_kernels() -> set[str]:
    """Every kernel that the package has."""
    found = set()
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        there = vars(importlib.import_module(f"{triton_kernels.__name__}.{module.name}"))
        found |= {name for name in there if name.endswith("_kernel")}
    return found
