"""The ops as functions. Shapes, dtypes and errors: see each op."""

from .ops.adapter_decompress import adapter_decompress
from .ops.compressed_ffn import compressed_ffn
from .ops.group_merge import group_merge

__all__ = ["adapter_decompress", "compressed_ffn", "group_merge"]
