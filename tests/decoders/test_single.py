"""Steps of decoding in few calls: what the other way gives, and where that one is taken."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.decoders import tiny
from variator_kernels.methods.variator import method
from variator_kernels.ops.self_attention import Scheme, Step, decoding, single

PROMPT, STEPS = 29, 14
SCHEMES = [(2, 0, 0), (2, 1, 3), (3, 5, 2), (4, 7, 1), (5, 3, 4), (4, 64, 4)]


@pytest.fixture
def calls(monkeypatch):
    """How often a layer went the short way."""
    made = [0]
    short = method.attend_single

    def counted(*given):
        y = short(*given)
        made[0] += y is not None
        return y

    monkeypatch.setattr(method, "attend_single", counted)
    return made


def model(scheme=(3, 5, 2), family="llama", **settings):
    ratio, window, kept = scheme
    return tiny.patched(family, {"attention_kv": ratio}, window=window, keep_first=kept, **settings)


def decoded(patched, tokens, cache=None, prompt=PROMPT, **given):
    """Logits of single steps behind a prompt."""
    cuts = [prompt, *range(prompt + 1, tokens.shape[1] + 1)]
    return tiny.in_pieces(patched, tokens, cuts, cache, **given)[0][:, prompt:]


def long_way(patched, tokens, monkeypatch, **given):
    with monkeypatch.context() as patch:
        patch.setattr(method, "single", lambda *_: None)
        return decoded(patched, tokens, **given)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_families(family, rows, calls, monkeypatch):
    patched = model(family=family)
    tokens = tiny.ids(rows, PROMPT + STEPS)
    got = decoded(patched, tokens)
    assert calls[0] == (STEPS - 1) * tiny.LAYERS  # the first step makes the ring smaller
    wanted = long_way(patched, tokens, monkeypatch)
    assert calls[0] == (STEPS - 1) * tiny.LAYERS
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_schemes(scheme, calls, monkeypatch):
    """From the first token on, so that kept ones come singly too."""
    patched = model(scheme, num_hidden_layers=1)
    tokens = tiny.ids(2, PROMPT)
    got = decoded(patched, tokens, prompt=1)
    assert calls[0] >= PROMPT - 2
    wanted = long_way(patched, tokens, monkeypatch, prompt=1)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(dtype, calls):
    """Section 6: at most twice the error of plain PyTorch in that dtype."""
    tokens = tiny.ids(2, PROMPT + STEPS)
    wanted = decoded(model(backend="reference"), tokens)
    assert calls[0] == 0
    plain = decoded(model(backend="reference").to(dtype), tokens)
    got = decoded(model().to(dtype), tokens)
    assert calls[0] > 0
    error, allowed = ((found.double() - wanted).abs().max() for found in (got, plain))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_products(dtype, calls, monkeypatch):
    """As processors with AVX-512 have them for one vector, too."""
    tokens = tiny.ids(2, PROMPT + STEPS)
    wide = {"hidden_size": 256, "intermediate_size": 64, "head_dim": 64, "num_hidden_layers": 1}
    wanted = decoded(model(backend="reference", **wide), tokens)
    plain = decoded(model(backend="reference", **wide).to(dtype), tokens)
    monkeypatch.setattr(decoding, "FEW", 0)
    packed = []

    class Product(decoding.Product):
        def __call__(self, *given, **more):
            packed.append(len(self.weights))
            return super().__call__(*given, **more)

    monkeypatch.setattr(decoding, "Product", Product)
    got = decoded(model(**wide).to(dtype), tokens)
    assert calls[0] == STEPS - 1 and packed == [3, 1] * calls[0]
    error, allowed = ((found.double() - wanted).abs().max() for found in (got, plain))
    assert error <= 2 * allowed + 1e-6


@torch.no_grad()
def test_what_holds_of_all_layers():
    """Bias and book of such a step are those of any."""
    for scheme in SCHEMES:
        patched = model(scheme, num_hidden_layers=1)
        tokens, cache = tiny.ids(2, PROMPT), DynamicCache()
        for at in range(PROMPT):
            past = cache.layers[0].book if at else None
            patched(tokens[:, at : at + 1], past_key_values=cache)
            if at < 2:
                continue
            positions = torch.full((1, 1), at)
            step = Step(Scheme(*scheme), past, None, positions, torch.float64)
            one = single(torch.zeros(2, 1, tiny.D), step)
            assert torch.equal(one.bias, step.bias_after)
            for name, mine in one.book._asdict().items():
                other = getattr(step.book, name)
                if name == "positions" and at < scheme[2] + scheme[0]:
                    continue  # nobody reads what is there before a group was complete
                assert torch.equal(mine, other) if torch.is_tensor(mine) else mine == other, name
            if step.groups:
                assert torch.equal(one.mean_positions, step.mean_positions)


@torch.no_grad()
def test_positions_by_row(calls, monkeypatch):
    """Rows may count from other numbers."""
    patched = model()
    tokens = tiny.ids(2, PROMPT + STEPS)
    positions = torch.arange(PROMPT + STEPS) + torch.tensor([[0], [17]])
    got = decoded(patched, tokens, position_ids=positions)
    assert calls[0] > 0
    wanted = long_way(patched, tokens, monkeypatch, position_ids=positions)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_rows_that_differ_go_the_other_way(calls):
    patched = model()
    tokens, mask, positions = tiny.padded([PROMPT, 20], "left")
    tokens, mask = (torch.cat((t, t[:, -STEPS:]), 1) for t in (tokens, mask))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    decoded(patched, tokens, attention_mask=mask, position_ids=positions)
    assert calls[0] == 0
    decoded(patched, tokens, attention_mask=torch.ones_like(mask))
    assert calls[0] > 0


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around",
    [torch.enable_grad, _Looks, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["gradients", "mode", "autocast"],
)
@torch.no_grad()
def test_who_looks_on(around, calls):
    patched = model(dtype=torch.float32)
    tokens = tiny.ids(1, PROMPT + STEPS)
    with around():
        got = decoded(patched, tokens)
    assert calls[0] == 0
    wanted = decoded(patched, tokens)
    assert calls[0] > 0
    close = {"rtol": 0.1, "atol": 0.1} if around not in (torch.enable_grad, _Looks) else {}
    torch.testing.assert_close(got.float(), wanted, **close)


@torch.no_grad()
def test_dropout(calls):
    patched = model(attention_dropout=0.5).train()
    decoded(patched, tiny.ids(1, PROMPT + STEPS))
    assert calls[0] == 0


@torch.inference_mode()
def test_inference_mode(calls, monkeypatch):
    patched = model()
    tokens = tiny.ids(2, PROMPT + STEPS)
    got = decoded(patched, tokens)
    assert calls[0] > 0
    torch.testing.assert_close(got, long_way(patched, tokens, monkeypatch), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_what_happens_in_between(calls, monkeypatch):
    """Rows are picked, repeated and taken back between single steps."""

    def run():
        cache = DynamicCache()
        patched(tokens[:, :PROMPT], past_key_values=cache)
        found, at = [], PROMPT
        for change in (
            lambda: None,
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0, 3, 2])),
            lambda: cache.crop(-1),
            lambda: None,
        ):
            with contextlib.suppress(ValueError):
                change()
            for _ in range(5):
                rows = len(cache.layers[0].book.seen)
                now = tokens[:1, at : at + 1].expand(rows, 1)
                found.append(patched(now, past_key_values=cache).logits)
                at += 1
        return found

    patched = model()
    tokens = tiny.ids(2, PROMPT + 40)
    got = run()
    assert calls[0] > 0
    monkeypatch.setattr(method, "single", lambda *_: None)
    for one, other in zip(got, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_weights_that_change(calls):
    """Of a product and of a merge, between two steps; in place and by another parameter."""
    for change in (
        lambda layer: layer.q_proj.weight.data.add_(0.1),
        lambda layer: setattr(
            layer.v_proj, "weight", torch.nn.Parameter(layer.v_proj.weight.detach() + 0.1)
        ),
        lambda layer: layer.plugins["3"].merge.weight.data.add_(0.5),
        lambda layer: layer.o_proj.register_forward_hook(lambda _, args, out: out + 0.1),
    ):
        patched, found = model(num_hidden_layers=1), []
        tokens, cache = tiny.ids(1, PROMPT + STEPS), DynamicCache()
        patched(tokens[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, PROMPT + STEPS):
            if at == PROMPT + 4:
                change(patched.model.layers[0].self_attn)
            found.append(patched(tokens[:, at : at + 1], past_key_values=cache).logits)
        before = calls[0]
        assert before > 0
        other, same, cache = model(num_hidden_layers=1), [], DynamicCache()
        other(tokens[:, :PROMPT], past_key_values=cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(method, "single", lambda *_: None)
            for at in range(PROMPT, PROMPT + STEPS):
                if at == PROMPT + 4:
                    change(other.model.layers[0].self_attn)
                same.append(other(tokens[:, at : at + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found), torch.cat(same), rtol=1e-11, atol=1e-11)
