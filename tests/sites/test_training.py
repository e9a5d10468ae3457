"""Training plugins: gradient checkpointing and data parallelism."""

import contextlib
import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import variator_kernels as vk
from tests.sites import tiny
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs")


def gradients(model, *, leave_first=True):
    """Plugin gradients at ratio 2, where the model's own ratio is 4, with another forward and
    another mask between forward and backward."""
    ids, mask = tiny.batch(11, 6, left=True)
    model.zero_grad()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with contextlib.ExitStack() as stack:
        stack.enter_context(vk.use_ratio(model, 2))
        out = tiny.encoder(model)(inputs_embeds=x, attention_mask=mask).last_hidden_state
        loss = (out * mask[..., None]).square().mean()
        if not leave_first:
            loss.backward()
    if leave_first:
        with torch.no_grad():
            tiny.encode(model, *tiny.batch(7))
        loss.backward()
    return [p.grad for p in vk.plugin_parameters(model)] + [x.grad]


@pytest.mark.parametrize("variant", [("t5", "relu"), ("umt5", "gated-gelu"), *tiny.BERT_VARIANTS])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("leave_first", [False, True])
def test_recompute_sees_the_same_mask_and_ratio(variant, reentrant, leave_first):
    plain = tiny.patched(*variant).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    block = find(saving).blocks[0]
    attention = block.attention if hasattr(block, "attention") else block.layer[0]
    attention.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    expected = gradients(plain, leave_first=leave_first)
    got = gradients(saving, leave_first=leave_first)
    assert len(calls) == 2 + leave_first, "nothing was recomputed"
    assert [g is None for g in got] == [g is None for g in expected]
    used = [(g, e) for g, e in zip(got, expected, strict=True) if e is not None]
    assert len(used) == 2 * 6 + 1
    for g, e in used:
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-4)
    assert tiny.encoder(saving).variator_state.local.context is None


def test_the_gradients_tell_ratio_and_mask_apart():
    model = tiny.patched()
    ids, mask = tiny.batch(11, 6, left=True)
    seen = []
    for given in (mask, torch.ones_like(mask)):
        model.zero_grad()
        tiny.encode(model, ids, given)[1, 5:].square().mean().backward()
        seen.append(model.encoder.block[0].layer[-1].plugins["4"].adapter.w2.grad)
    assert not torch.allclose(*seen, rtol=0.01)


def test_checkpointing_around_a_whole_encoder():
    model = tiny.patched().train()
    expected = gradients(model)
    ids, mask = tiny.batch(11, 6, left=True)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    vk.set_ratio(model, 2)
    model.zero_grad()
    out = checkpoint(
        lambda x: model.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state,
        x,
        use_reentrant=False,
    )
    (out * mask[..., None]).square().mean().backward()
    torch.testing.assert_close(x.grad, expected[-1], atol=1e-6, rtol=1e-4)


def test_refuses_a_recompute_that_lost_its_mask():
    model = tiny.patched().train()
    layer = model.encoder.block[0].layer[-1]
    x = torch.randn(1, 9, 24, requires_grad=True)
    loss = checkpoint(layer, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="recomputed outside its encoder"):
        loss.backward()


def test_a_block_alone_can_be_checkpointed():
    model = tiny.patched().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    x = torch.randn(1, 9, 24, requires_grad=True)
    with vk.use_ratio(model, 2):
        out = model.encoder.block[0](x, None, cache_position=torch.arange(9))[0]
    out.square().sum().backward()
    plugins = model.encoder.block[0].layer[-1].plugins
    assert plugins["2"].adapter.w2.grad is not None
    assert plugins["4"].adapter.w2.grad is None


WORKER = """
    import sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import variator_kernels as vk
    from tests.sites import tiny

    torch.set_num_threads(1)
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = tiny.patched(head="EncoderModel", ratios=(4,)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".plugins." in name)
    ids, mask = tiny.batch(9, 4, 6, 9)
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        mine = slice(2 * rank, 2 * rank + 2)
        hidden = parallel(ids[mine], attention_mask=mask[mine]).last_hidden_state
        (hidden * mask[mine][..., None]).square().sum().div(2).backward()
    if rank == 0:
        torch.save([p.grad for p in vk.plugin_parameters(model)], out)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    root = Path(__file__).parents[2]
    commands = [
        [sys.executable, "-c", textwrap.dedent(WORKER), str(rank), *map(str, paths)]
        for rank in (0, 1)
        for paths in [(tmp_path / "store", tmp_path / "grads.pt")]
    ]
    workers = [
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    model = tiny.patched(head="EncoderModel", ratios=(4,)).train()
    ids, mask = tiny.batch(9, 4, 6, 9)
    hidden = model(ids, attention_mask=mask).last_hidden_state
    (hidden * mask[..., None]).square().sum().div(4).backward()
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    for got, parameter in zip(grads, vk.plugin_parameters(model), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)
