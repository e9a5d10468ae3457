"""Arguments travel bundled below the registered ops, and the reference is pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "variator_kernels" / "ops"
FILES = sorted(OPS.rglob("*.py"))
MOST = 8
PUBLIC = {
    f"{op}/__init__.py" for op in ("adapter_decompress", "compressed_ffn", "grouped_attention")
}
"""Public functions take what the specification names one by one."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(OPS)))
def test_no_function_takes_more_than_eight_arguments(path):
    if str(path.relative_to(OPS)) in PUBLIC:
        pytest.skip("a public signature")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names = [name for name in names if name != "self"]
            assert len(names) <= MOST, f"{path.name}:{node.lineno} {node.name}({', '.join(names)})"


PURE = """
import sys, types
for name in ("variator_kernels.extension", "variator_kernels.ops.prepack"):
    sys.modules[name] = None
package = types.ModuleType("variator_kernels")
package.__path__ = [sys.argv[1]]
sys.modules["variator_kernels"] = package
import importlib, torch
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights
from variator_kernels.ops.groups import Groups, plain_lists
reference = {}
for op in ("group_merge", "adapter_decompress", "compressed_ffn", "grouped_attention"):
    folder = types.ModuleType(f"variator_kernels.ops.{op}")
    folder.__path__ = [f"{sys.argv[1]}/ops/{op}"]
    sys.modules[folder.__name__] = folder
    reference[op] = importlib.import_module(f"{folder.__name__}.reference")
d, k, r = 4, 2, 3
x = torch.randn(2, 5, d)
shapes = (k, k * d), (k,), (r, 2 * d), (r,), (d, r), (d,)
plugin = PluginWeights(*(torch.randn(s) for s in shapes))
ffn = FeedForward(torch.randn(6, d), torch.randn(d, 6))
groups = Groups(*plain_lists(2, 5, k, "cpu"), None, None, None, k, "listed")
y = reference["compressed_ffn"].compressed_ffn(x, plugin, ffn, groups)
assert y.shape == x.shape and y.isfinite().all()
q = torch.randn(2, 5, 3, 4)
attention = reference["grouped_attention"]
assert attention.grouped_attention(q, q, q, attention.EVERYTHING, None, 1.0).isfinite().all()
ours = sorted(m for m in sys.modules if m.startswith("variator_kernels.") and sys.modules[m])
print(*ours)
"""


def test_the_reference_reaches_no_packing_and_no_extension():
    done = subprocess.run(
        [sys.executable, "-c", PURE, str(OPS.parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reached = {name.removeprefix("variator_kernels.ops.") for name in done.stdout.split()}
    pieces = {"arguments", "feed_forward", "groups", "transforms", "grouped_attention.relative"}
    folders = {"group_merge", "adapter_decompress", "compressed_ffn", "grouped_attention"}
    assert reached - {"variator_kernels.ops"} <= pieces | folders | {
        f"{folder}.reference" for folder in folders
    }
