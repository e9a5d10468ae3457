"""Compression plugins (Variator) that make transformer models faster: ops, modules and patches."""

from . import analysis, flops, functional
from .checkpoint import load_plugins, save_plugins
from .methods.variator import AdapterDecompress, CompressedFFN, GroupMerge, Plugin
from .methods.variator.calibration import calibrate
from .ops.feed_forward import FeedForward, PluginWeights
from .patching import patch, patch_bert, patch_t5, plugin_parameters, unpatch
from .runtime.ratio import set_ratio, use_ratio

__version__ = "0.1.0"

__all__ = [
    "AdapterDecompress",
    "CompressedFFN",
    "FeedForward",
    "GroupMerge",
    "Plugin",
    "PluginWeights",
    "__version__",
    "analysis",
    "calibrate",
    "flops",
    "functional",
    "load_plugins",
    "patch",
    "patch_bert",
    "patch_t5",
    "plugin_parameters",
    "save_plugins",
    "set_ratio",
    "unpatch",
    "use_ratio",
]

flops.register()
