"""Modules that hold the parameters of the ops."""

from .adapter_decompress import AdapterDecompress
from .compressed_ffn import CompressedFFN
from .group_merge import GroupMerge
from .plugin import Plugin

__all__ = ["AdapterDecompress", "CompressedFFN", "GroupMerge", "Plugin"]
