"""What the loops of ``attention_loops.py`` ask of a family: products, norms, terms of scores."""

import math

import torch
import torch.nn.functional as F

from tests.sites import zoo
from tests.sites.attention_cases import places

HEAD = zoo.D // zoo.HEADS


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
