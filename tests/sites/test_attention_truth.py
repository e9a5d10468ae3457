"""attention_kv and attention against loops written from the specification, in float64."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import variator_kernels as vk
from tests.sites import zoo
from tests.sites.attention_cases import patched, placed, places, ragged, sublayer
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


def turn_neighbours(vector, position, base):
    frequency = 1 / base ** (torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    cos, sin = (position * frequency).cos(), (position * frequency).sin()
    a, b = vector[::2], vector[1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten()


class Bert:
    base = window = table = None
    size, within = HEAD, 1e-9
    turn = staticmethod(turn)
    scale = 1 / math.sqrt(HEAD)

    def __init__(self, layer):
        inner, self.layer = layer.self, layer
        self.products = [inner.query, inner.key, inner.value, layer.output.dense]

    def before(self, x):
        return x

    def after(self, x, o):
        return self.layer.output.LayerNorm(x + o)

    def pair(self, row, query, key, head, asks, answers):
        """What a query of tokens ``query`` and a key of tokens ``key`` add to each other."""
        return 0.0

    def sums(self, row, vectors):
        """What becomes global keys of a row: of ``(vector, place, tokens)``."""
        return []


def between(values, query, key):
    """From the mean over one's tokens to that over the other's, as a whole number."""
    ends = [sum(float(values[t]) for t in tokens) / len(tokens) for tokens in (query, key)]
    return math.floor(ends[1] - ends[0] + 0.5)


class Esm(Bert):
    def __init__(self, layer):
        super().__init__(layer)
        self.base = 10000.0

    def before(self, x):
        return self.layer.LayerNorm(x)

    def after(self, x, o):
        return x + o


class RoFormer(Bert):
    turn = staticmethod(turn_neighbours)
    within = 1e-5  # its table is in fp32

    def __init__(self, layer):
        super().__init__(layer)
        self.base = 10000.0


class DebertaV2(Bert):
    scale = 1 / math.sqrt(3 * HEAD)
    buckets = 8

    def __init__(self, layer):
        inner, self.layer = layer.self, layer
        self.products = [inner.query_proj, inner.key_proj, inner.value_proj, layer.output.dense]
        self.distances(layer, inner.pos_key_proj, inner.pos_query_proj)

    def distances(self, layer, of_keys, of_queries):
        vectors = layer.variator_reach.owner.encoder.get_rel_embedding()
        self.of_keys, self.of_queries = of_keys(vectors), of_queries(vectors)

    def column(self, distance):
        """Of query - key."""
        middle, most = self.buckets // 2, 32
        size, sign = abs(distance), (distance > 0) - (distance < 0)
        if size > middle:
            far = math.log(size / middle) / math.log((most - 1) / middle) * (middle - 1)
            distance = (math.ceil(far) + middle) * sign
        return min(max(distance + self.buckets, 0), 2 * self.buckets - 1)

    def pair(self, row, query, key, head, asks, answers):
        column = self.column(-between(range(1000), query, key))
        at = slice(head * HEAD, (head + 1) * HEAD)
        both = asks @ self.of_keys[column, at] + answers @ self.of_queries[column, at]
        return self.scale * both


class Deberta(DebertaV2):
    def __init__(self, layer):
        inner, self.layer = layer.self, layer
        w = inner.in_proj.weight.view(zoo.HEADS, 3, HEAD, -1)
        biases = [inner.q_bias, 0, inner.v_bias]
        self.products = [
            *(lambda x, i=i: w[:, i].flatten(0, 1) @ x + biases[i] for i in range(3)),
            layer.output.dense,
        ]
        self.distances(layer, inner.pos_proj, inner.pos_q_proj)

    def after(self, x, o):
        norm = self.layer.output.LayerNorm  # which rounds to fp32
        size = norm.weight.shape
        return F.layer_norm(x + o, size, norm.weight, norm.bias, norm.variance_epsilon)

    def column(self, distance):
        return min(max(distance + 64, 0), 127)


class LayoutLMv3(Bert):
    def __init__(self, layer):
        super().__init__(layer)
        self.encoder = layer.variator_reach.owner.encoder
        self.places = places(torch.empty(3, 11, 1))

    def pair(self, row, query, key, head, asks, answers):
        encoder, boxes = self.encoder, self.places["bbox"][row]
        of_columns = encoder.rel_pos_bias.weight, self.places["position_ids"][row]
        of_x = encoder.rel_pos_x_bias.weight, boxes[:, 0]
        of_y = encoder.rel_pos_y_bias.weight, boxes[:, 3]
        total = 0.0
        for (weight, values), most in ((of_columns, 128), (of_x, 256), (of_y, 256)):
            found = bucket(between(values, query, key), weight.shape[1], most)
            total = total + weight[head, found]
        return self.scale * total


class T5(Bert):
    scale, size, t5 = 1.0, 4, (32, 128)

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


class LongT5(T5):
    def __init__(self, layer):
        inner, self.layer = layer.LocalSelfAttention, layer
        self.products = [inner.q, inner.k, inner.v, inner.o]
        self.table, self.window = inner.relative_attention_bias.weight, inner.local_radius + 1


class LongT5Global(LongT5):
    t5 = 8, 3

    def __init__(self, layer):
        inner, self.layer = layer.TransientGlobalSelfAttention, layer
        self.products = [inner.q, inner.k, inner.v, inner.o]
        self.table, self.window = inner.relative_attention_bias.weight, inner.local_radius + 1
        self.of_blocks = inner.global_relative_attention_bias.weight
        self.norm, self.size_of_block = inner.global_input_layer_norm, inner.global_block_size

    def whole(self, row):
        places = [t - row.index(True) for t, there in enumerate(row) if there]
        return sum(t % self.size_of_block == self.size_of_block - 1 for t in places)

    def block(self, row, place):
        at = math.ceil(place - 0.5) - row.index(True)
        return min(at // self.size_of_block, self.whole(row) - 1)

    def sums(self, row, vectors):
        found = []
        for number in range(self.whole(row)):
            total = torch.zeros(zoo.D, dtype=torch.float64)
            for vector, place, tokens in vectors:
                if self.block(row, place) == number:
                    total = total + tokens * vector
            mean = total.square().mean()
            found.append(total / (mean + self.norm.variance_epsilon).sqrt() * self.norm.weight)
        return found

    def of_block(self, row, place, number, head):
        return self.of_blocks[bucket(number - self.block(row, place), *self.t5), head]


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
    """``queries``: (vector, position); ``keys``: (vector, position); ``bias(i, j, head, asks,
    answers)`` of the two's vectors in a head, before they are turned."""
    q, k, v, o = model.products
    out = []
    for i, (vector, place) in enumerate(queries):
        heads = []
        for head in range(zoo.HEADS):
            at = slice(head * model.size, (head + 1) * model.size)
            plain, scores, values = q(vector)[at], [], []
            asks = model.turn(plain, place, model.base) if model.base else plain
            for j, (source, where) in enumerate(keys):
                answers = k(source)[at]
                key = model.turn(answers, where, model.base) if model.base else answers
                scores.append(model.scale * (asks @ key) + bias(i, j, head, plain, answers))
                values.append(v(source)[at])
            scores = torch.stack(scores)
            weights = scores.softmax(0) if scores.isfinite().any() else torch.zeros_like(scores)
            heads.append(weights @ torch.stack(values))
        out.append(o(torch.cat(heads)))
    return out


def expected(model, plugin, placement, x, row, first, kept, number):
    """Of one row ``x [n, d]``, the ``number``th; padding as it came, or 0 without a residual."""
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
            if model.table is None:
                return 0.0
            return model.table[bucket(distance, *model.t5), head].item()

        further = model.sums(row, [(h[t], t, 1) for t in tokens])

        def bias(i, j, head, *both):
            if j >= len(groups):
                return model.of_block(row, tokens[i], j - len(groups), head)
            terms = [
                of_token(t - tokens[i], head) + model.pair(number, [tokens[i]], [t], head, *both)
                for t in groups[j].places
            ]
            return torch.tensor(terms, dtype=torch.float64).logsumexp(0)

        keys += [(vector, 0) for vector in further]
        out = attended(model, h, [(h[t], t) for t in tokens], keys, bias)
        for t, o in zip(tokens, out, strict=True):
            y[t] = model.after(x[t], o)
        return y

    tokens = [len(group.places) for group in groups]
    further = model.sums(row, list(zip(vectors, means, tokens, strict=True)))
    more = keys + [(vector, 0) for vector in further]

    def bias_of_means(i, j, head, *both):
        if j >= len(groups):
            return model.of_block(row, means[i], j - len(groups), head)
        distance = math.floor(means[j] - means[i] + 0.5)
        if not seen(distance):
            return -math.inf
        term = 0.0 if model.table is None else model.table[bucket(distance, *model.t5), head]
        term = term + model.pair(number, groups[i].places, groups[j].places, head, *both)
        return math.log(len(groups[j].places)) + term

    adapter = plugin.adapter
    for group, u in zip(groups, attended(model, h, keys, more, bias_of_means), strict=True):
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
        ("longt5", LongT5, 0),
        ("longt5-global", LongT5Global, 0),
        ("esm", Esm, 0),
        ("roformer", RoFormer, 0),
        ("deberta", Deberta, 0),
        ("deberta-v2", DebertaV2, 0),
        ("layoutlmv3", LayoutLMv3, 1),
    ],
)
@torch.no_grad()
def test_ours_is_what_the_specification_says(name, kind, number, left, backend, placement):
    own = {"config_global_attn_every_n_layers": 2} if name == "modernbert" else {}
    if name == "deberta-v2":
        own = {"config_position_buckets": 8, "config_max_relative_positions": 32}
        own["config_norm_rel_ebd"] = "layer_norm"
    if name == "longt5-global":
        buckets, most = kind.t5
        own = {"config_relative_attention_num_buckets": buckets}
        own["config_relative_attention_max_distance"] = most
    model = patched(name, placement, keep_first=1, backend=backend, **own).double()
    layer = find(model).attentions[number]
    x, mask = ragged(left=left)
    kept = torch.zeros_like(mask)
    kept[0, 7] = kept[1, 0] = True
    with vk.keep(model, kept):
        got = sublayer(model, x, mask, number)
    plugin = layer.plugins[str(K)]
    for row in range(len(x)):
        whole = set(kept[row].nonzero().flatten().tolist())
        model = kind(layer)
        truth = expected(model, plugin, placement, x[row], mask[row].tolist(), 1, whole, row)
        torch.testing.assert_close(got[row], truth, atol=model.within, rtol=0, equal_nan=True)
