"""attention_kv and attention against loops written from the specification, in float64."""

import math
from typing import NamedTuple

import pytest
import torch

import variator_kernels as vk
from tests.sites import zoo
from tests.sites.attention_cases import patched, placed, ragged, sublayer
from variator_kernels.sites.find import find

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
K, HEAD = 3, zoo.D // zoo.HEADS


class Group(NamedTuple):
    start: int
    places: list[int]
    whole: bool = False


def groups_of(row, first, kept):
    """Of ``row``, bools of real tokens. What lies between kept tokens is cut every K places from
    its first real token on."""
    real = [t for t, there in enumerate(row) if there]
    whole = {*real[:first], *(t for t in real if t in kept)}
    made, begin = [], None
    for t in real:
        if t in whole:
            made.append(Group(t, [t], True))
            begin = None
            continue
        begin = t if begin is None else begin
        start = begin + (t - begin) // K * K
        if not made or made[-1].whole or made[-1].start != start:
            made.append(Group(start, []))
        made[-1].places.append(t)
    return made


def merged(plugin, h, group):
    if group.whole:
        return h[group.start]
    slots = torch.zeros(K, h.shape[-1], dtype=h.dtype)
    exists = torch.full((K,), -math.inf, dtype=h.dtype)
    for t in group.places:
        slots[t - group.start], exists[t - group.start] = h[t], 0
    scores = plugin.merge.weight @ slots.flatten() + plugin.merge.bias + exists
    return scores.softmax(0) @ slots


def bucket(distance, buckets=32, most=128):
    half, side = buckets // 2, (buckets // 2 if distance > 0 else 0)
    distance = abs(distance)
    exact = half // 2
    if distance < exact:
        return side + distance
    far = exact + int(math.log(distance / exact) / math.log(most / exact) * (half - exact))
    return side + min(far, half - 1)


def turn(vector, position, base):
    """A head's halves are the two components; angle ``position / base^(2i / size)``, which
    transformers takes in fp32 whatever the model's type."""
    half = HEAD // 2
    frequency = 1 / torch.tensor(base) ** (torch.arange(0, HEAD, 2) / HEAD)
    angle = torch.tensor(position, dtype=torch.float32) * frequency
    a, b = vector[:half], vector[half:]
    cos, sin = angle.cos().double(), angle.sin().double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


class Bert:
    base = window = table = None
    size = HEAD
    scale = 1 / math.sqrt(HEAD)

    def __init__(self, layer):
        inner, self.layer = layer.self, layer
        self.products = [inner.query, inner.key, inner.value, layer.output.dense]

    def before(self, x):
        return x

    def after(self, x, o):
        return self.layer.output.LayerNorm(x + o)


class T5(Bert):
    scale, size = 1.0, 4

    def __init__(self, layer):
        inner, self.layer = layer.SelfAttention, layer
        self.products = [inner.q, inner.k, inner.v, inner.o]
        self.table = inner.relative_attention_bias.weight

    def before(self, x):
        norm = self.layer.layer_norm
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + norm.variance_epsilon).sqrt() * norm.weight

    def after(self, x, o):
        return x + o


class ModernBert(Bert):
    def __init__(self, layer):
        third = layer.Wqkv.weight.chunk(3)
        self.products = [*(lambda x, w=w: x @ w.T for w in third), layer.Wo]
        self.window = layer.sliding_window
        kind = "full_attention" if self.window is None else "sliding_attention"
        self.base = layer.config.rope_parameters[kind]["rope_theta"]

    def after(self, x, o):
        return o


def attended(model, h, queries, keys, bias):
    """``queries``: (vector, position); ``keys``: (vector, position); ``bias(i, j, head)``."""
    q, k, v, o = model.products
    out = []
    for i, (vector, place) in enumerate(queries):
        heads = []
        for head in range(zoo.HEADS):
            at = slice(head * model.size, (head + 1) * model.size)
            asks, scores, values = q(vector)[at], [], []
            if model.base:
                asks = turn(asks, place, model.base)
            for j, (source, where) in enumerate(keys):
                key = k(source)[at]
                if model.base:
                    key = turn(key, where, model.base)
                scores.append(model.scale * (asks @ key) + bias(i, j, head))
                values.append(v(source)[at])
            scores = torch.stack(scores)
            weights = scores.softmax(0) if scores.isfinite().any() else torch.zeros_like(scores)
            heads.append(weights @ torch.stack(values))
        out.append(o(torch.cat(heads)))
    return out


def expected(model, plugin, placement, x, row, first, kept):
    """Of one row ``x [n, d]``; padding as it came, or 0 without a residual."""
    y = x.clone() if not isinstance(model, ModernBert) else torch.zeros_like(x)
    groups = groups_of(row, first, kept)
    if not groups:
        return y
    h = model.before(torch.nan_to_num(x))
    vectors = [merged(plugin, h, group) for group in groups]
    means = [sum(g.places) / len(g.places) for g in groups]
    keys = list(zip(vectors, means, strict=True))

    def seen(distance):
        return model.window is None or abs(distance) < model.window

    if placement == "attention_kv":
        tokens = [t for t, there in enumerate(row) if there]

        def of_token(distance, head):
            if not seen(distance):
                return -math.inf
            return 0.0 if model.table is None else model.table[bucket(distance), head].item()

        def bias(i, j, head):
            terms = [of_token(t - tokens[i], head) for t in groups[j].places]
            return torch.tensor(terms, dtype=torch.float64).logsumexp(0)

        out = attended(model, h, [(h[t], t) for t in tokens], keys, bias)
        for t, o in zip(tokens, out, strict=True):
            y[t] = model.after(x[t], o)
        return y

    def bias_of_means(i, j, head):
        distance = math.floor(means[j] - means[i] + 0.5)
        if not seen(distance):
            return -math.inf
        term = 0.0 if model.table is None else model.table[bucket(distance), head]
        return math.log(len(groups[j].places)) + term

    adapter = plugin.adapter
    for group, u in zip(groups, attended(model, h, keys, keys, bias_of_means), strict=True):
        for t in group.places:
            inner = torch.tanh(adapter.w1 @ torch.cat([u, h[t]]) + adapter.b1)
            o = u if group.whole else u + adapter.w2 @ inner + adapter.b2
            y[t] = model.after(x[t], o)
    return y


@placed
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("bert", Bert, 0),
        ("t5", T5, 0),
        ("modernbert", ModernBert, 0),
        ("modernbert", ModernBert, 1),
    ],
)
@torch.no_grad()
def test_ours_is_what_the_specification_says(name, kind, number, left, backend, placement):
    own = {"config_global_attn_every_n_layers": 2} if name == "modernbert" else {}
    model = patched(name, placement, keep_first=1, backend=backend, **own).double()
    layer = find(model).attentions[number]
    x, mask = ragged(left=left)
    kept = torch.zeros_like(mask)
    kept[0, 7] = kept[1, 0] = True
    with vk.keep(model, kept):
        got = sublayer(model, x, mask, number)
    plugin = layer.plugins[str(K)]
    for row in range(len(x)):
        places = set(kept[row].nonzero().flatten().tolist())
        truth = expected(kind(layer), plugin, placement, x[row], mask[row].tolist(), 1, places)
        torch.testing.assert_close(got[row], truth, atol=1e-9, rtol=0, equal_nan=True)
