"""The ops as functions. Shapes, dtypes and errors: see each op."""

from .ops.adapter_decompress import adapter_decompress
from .ops.compressed_ffn import compressed_ffn
from .ops.group_merge import group_merge
from .ops.grouped_attention import DistanceBias, distance_bias, grouped_attention

__all__ = [
    "DistanceBias",
    "adapter_decompress",
    "compressed_ffn",
    "distance_bias",
    "group_merge",
    "grouped_attention",
]
