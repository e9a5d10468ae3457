"""Variator: compression plugins around frozen sublayers (arXiv 2310.15724)."""

from .adapter_decompress import AdapterDecompress
from .compressed_ffn import CompressedFFN
from .group_merge import GroupMerge
from .plugin import Plugin

__all__ = ["AdapterDecompress", "CompressedFFN", "GroupMerge", "Plugin"]
