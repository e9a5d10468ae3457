"""Compression plugins (Variator) that make transformer models faster: ops, modules and patches."""

from . import backends  # noqa: F401  (first: what it refuses must leave nothing registered)

# isort: split
from . import analysis, flops, functional, pretrained
from .checkpoint import load_plugins, save_plugins
from .description import describe
from .freezing import freeze, thaw
from .methods.projected import merge, project
from .methods.variator import AdapterDecompress, CompressedFFN, GroupMerge, Plugin
from .methods.variator.calibration import calibrate
from .methods.variator.method import plugin_parameters
from .ops import flop_formulas
from .ops.feed_forward import FeedForward, PluginWeights
from .patching import patch, patch_bert, patch_llama, patch_t5, unpatch
from .planning import plan
from .runtime.controller import RatioController
from .runtime.controller_times import LevelTimes
from .runtime.keep import keep
from .runtime.levels import set_ratio, use_ratio
from .runtime.plan import Plan
from .runtime.warming import warm
from .sites.attention_paths import AttentionPaths
from .sites.family import Family
from .sites.term_paths import DistancePaths, GlobalPaths, PlacePaths
from .version import __version__

__all__ = [
    "AdapterDecompress",
    "AttentionPaths",
    "CompressedFFN",
    "DistancePaths",
    "Family",
    "FeedForward",
    "GlobalPaths",
    "GroupMerge",
    "LevelTimes",
    "PlacePaths",
    "Plan",
    "Plugin",
    "PluginWeights",
    "RatioController",
    "__version__",
    "analysis",
    "calibrate",
    "describe",
    "flops",
    "freeze",
    "functional",
    "keep",
    "load_plugins",
    "merge",
    "patch",
    "patch_bert",
    "patch_llama",
    "patch_t5",
    "plan",
    "plugin_parameters",
    "project",
    "save_plugins",
    "set_ratio",
    "thaw",
    "unpatch",
    "use_ratio",
    "warm",
]

flop_formulas.register()
pretrained.register()
