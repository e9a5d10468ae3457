"""``torch.compile`` of patched encoders on the CPU: a graph holds sublayers whole, each as the op
that runs without a compiler, and weights are packed once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import variator_kernels as vk
from tests.ops.cases import needs_cpu
from tests.sites.optimize_cases import batch, plain
from variator_kernels.ops.arguments import MergeWeights
from variator_kernels.ops.make_groups import make_groups
from variator_kernels.ops.packed import PackCache
from variator_kernels.ops.self_attention import (
    SelfAttention,
    Terms,
    attention_kv,
    members,
    whole_queries,
)
from variator_kernels.ops.transforms import graphing
from variator_kernels.sites.find import find
from variator_kernels.sites.unchanged import check_attention


def _tells():
    """Whether this PyTorch tells compiled code apart from code that is exported."""
    compiled = torch.compile(lambda x: x + float(graphing()), fullgraph=True, backend="eager")
    return bool(compiled(torch.zeros(1)) == 1)


pytestmark = [
    needs_cpu,
    pytest.mark.skipif(not _tells(), reason="PyTorch takes compiled code for exported code"),
]
ATTENTION, DENSE, COMPRESSED, EACH = (
    "variator.self_attention.default", "variator.feed_forward.default",
    "variator.compressed_ffn.default", "variator.int8_linear.default",
)  # fmt: skip
PRODUCTS = {"aten.addmm.default", "aten.mm.default", "aten.bmm.default", "aten.linear.default"}


class Graphs:
    """A backend that runs graphs as they are, and counts what they call."""

    def __init__(self):
        self.called = Counter()

    def __call__(self, module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph, _):
            self.called += Counter(
                str(node.target) for node in graph.graph.nodes if node.op == "call_function"
            )
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=compiler)(module, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_of(model):
    """Of a batch with padding at either end and holes: what its real tokens come out as."""
    given = batch()
    given["attention_mask"][0, :4] = 0
    given["attention_mask"][2, 20:23] = 0
    real = given["attention_mask"].bool()

    def run(how=model):
        return how(**given).last_hidden_state[real]

    return run


@pytest.mark.parametrize("placements", [("ffn",), ("ffn", "attention_kv")])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
@torch.no_grad()
def test_a_graph_holds_sublayers_whole(name, placements):
    model = plain(name)
    try:
        check_attention(find(model))
    except ValueError as error:  # of an older transformers
        pytest.skip(str(error))
    vk.patch(model, 1, (2,), 8, placements=placements, optimize="encoder")
    run = run_of(model)
    for ratio, calls in (
        (1, {ATTENTION: 2, DENSE: 2, COMPRESSED: 0}),
        (2, {ATTENTION: 2, DENSE: 0, COMPRESSED: 2}),
    ):
        graphs = Graphs()
        with vk.use_ratio(model, ratio):
            compiled = torch.compile(model, fullgraph=True, backend=graphs)
            torch.testing.assert_close(run(compiled), run(), rtol=1e-5, atol=1e-5)
        assert calls == {op: graphs.called[op] for op in calls}
        behind = {"bert": 1, "t5": 0, "modernbert": 2}[name]  # BERT's pooler, angles of rotations
        assert sum(graphs.called[op] for op in PRODUCTS) <= behind
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bert", "t5"])
@torch.no_grad()
def test_merged_keys_need_no_optimize(name):
    """Compressed sublayers run so whatever ``optimize`` is, as without a compiler."""
    model = vk.patch(plain(name), 2, (2,), 8, placements=("ffn", "attention_kv"))
    graphs, run = Graphs(), run_of(model)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    torch.testing.assert_close(run(compiled), run(), rtol=1e-5, atol=1e-5)
    assert graphs.called[ATTENTION] == graphs.called[COMPRESSED] == 2


@torch.no_grad()
def test_int8():
    model = vk.patch(
        plain("bert"), 2, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder",
        precision="int8",
    )  # fmt: skip
    run = run_of(model)
    for ratio in (1, 2):
        graphs = Graphs()
        with vk.use_ratio(model, ratio):
            compiled = torch.compile(model, fullgraph=True, backend=graphs)
            assert torch.equal(run(compiled), run())
        assert graphs.called[ATTENTION] == 2 and graphs.called[EACH] == 0
        torch._dynamo.reset()


@torch.no_grad()
def test_norms_of_heads_stay_in_the_graph():
    """They are modules, which no registered op takes."""
    heads, size = 4, 8
    q_norm, k_norm = nn.RMSNorm(size), nn.RMSNorm(size)
    q_norm.weight.fill_(4.0)
    weights = [torch.randn(heads * size, heads * size) for _ in range(4)]
    a = SelfAttention(*weights, size, 0.3, q_norm=q_norm, k_norm=k_norm)
    merge = MergeWeights(torch.randn(2, 2 * heads * size), torch.randn(2))

    def run(x):
        groups = make_groups(x, 2, backend="cpu")
        keys = whole_queries(members(groups, x), x, Terms())
        return attention_kv(x, merge, a, groups, keys, None, "cpu")

    x, graphs = torch.randn(2, 7, heads * size), Graphs()
    found = torch.compile(run, fullgraph=True, backend=graphs)(x)
    torch.testing.assert_close(found, run(x), rtol=1e-4, atol=1e-4)
    assert graphs.called[ATTENTION] == 0


def test_where_a_gradient_may_be_asked_for_every_step_is_in_the_graph():
    model = vk.patch(plain("bert"), 2, (2,), 8, placements=("ffn", "attention_kv"))
    model.get_input_embeddings().weight.requires_grad_(True)
    graphs, run = Graphs(), run_of(model)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    found, expected = run(compiled), run()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs.called[ATTENTION] == 0
    weight = model.get_input_embeddings().weight
    for a, b in zip(
        torch.autograd.grad(found.sum(), weight), torch.autograd.grad(expected.sum(), weight),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exported_programs_hold_every_step():
    """They may run elsewhere, and be trained."""
    model = vk.patch(
        plain("bert"), 2, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder"
    )
    program = torch.export.export(model, (), batch(), strict=False)
    assert not {ATTENTION, DENSE} & {str(node.target) for node in program.graph.nodes}


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # or PyTorch minds no later hook
@torch.no_grad()
def test_what_changes_afterwards_counts():
    """Weights and hooks of a model that is compiled already."""
    model = vk.patch(
        plain("bert"), 2, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder"
    )
    run = run_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ratio in (1, 2):
        with vk.use_ratio(model, ratio):
            before = run(compiled)
            first = find(model).blocks[0].attention.self
            first.key.weight.data.mul_(3)
            first.query.bias.data.add_(1)
            changed = run(compiled)
            assert not torch.equal(changed, before)
            torch.testing.assert_close(changed, run(), rtol=1e-5, atol=1e-5)
            handle = first.value.register_forward_hook(lambda *args: 2 * args[-1])
            torch.testing.assert_close(run(compiled), run(), rtol=1e-5, atol=1e-5)
            assert not torch.equal(run(compiled), changed)
            handle.remove()


@pytest.mark.slow
@torch.no_grad()
def test_weights_that_are_frozen_in_are_packed_once(monkeypatch):
    """Inductor makes constants of few numbers anew in each call: a merge's bias."""
    model = vk.patch(
        plain("bert"), 2, (2,), 8, placements=("ffn", "attention_kv"), optimize="encoder"
    )
    for module in model.modules():
        for plugin in getattr(module, "plugins", {}).values():
            plugin.merge.bias.data.normal_()
    run = run_of(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(run(compiled), run(), rtol=1e-4, atol=1e-4)
    run(compiled)
    made, asked, get = [], [], PackCache.get

    def counted(self, sources, kind, make):
        asked.append(kind)
        return get(self, sources, kind, lambda *copies: made.append(kind) or make(*copies))

    monkeypatch.setattr(PackCache, "get", counted)
    run(compiled)
    assert len(asked) >= 4 and not made
